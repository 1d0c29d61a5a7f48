"""Two questions of a config.json: can the weights be exported, and can Megatron build the model.

No weight depends on how a rotary embedding is scaled, on an activation, on a window or on how a router scores. A model
with any of these is exported with its config.json as it was, though Megatron's layers may compute something else.
"""

import copy
import json
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import HFModel, read_hf_model
from amaxbridge.bridge.plan.dry_run import plan_import, plan_on_mesh
from amaxbridge.bridge.plan.mesh import Mesh
from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import FAMILIES
from tests.support.checkpoints import tensors_in
from tests.support.stored_checkpoints import megatron_state, write_state
from tests.support.tiny_models import TINY_MODELS

type Fields = dict[str, Any]

FAMILY_MODELS = [name for name in TINY_MODELS if "HybridModel" not in name and "images" not in name]
ROPES: Mapping[str, Mapping[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.2},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "factor": 4.0},
    "of one's own": {"rope_type": "ntk_by_parts", "alpha": 3.0},
}
COMPUTED: Mapping[str, Mapping[str, Any]] = {
    "activation": {"hidden_act": "gelu", "hidden_activation": "gelu", "mlp_hidden_act": "gelu"},
    "window": {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
    "clipping": {"clip_qkv": 8.0},
    "router": {"norm_topk_prob": False},
    "swiglu": {"swiglu_alpha": 1.0},
    "both directions": {"use_bidirectional_attention": True},
    "scales": {"rms_norm_eps": 1e-3, "attn_logit_softcapping": 30.0, "query_pre_attn_scalar": 99},
}
HYBRIDS = ("Nemotron-H", "Nemotron 3 Super, latent experts")
NOT_BUILT: Mapping[str, frozenset[str]] = {  # what `COMPUTED` has that the architecture reads, and Megatron cannot
    "activation": frozenset(TINY_MODELS) - {"GPT-OSS"},  # which transformers gives no choice
    "window": frozenset({"MiMo", "Qwen2.5", "Qwen3", "Qwen3, tied", "Qwen1.5-MoE", "Qwen3-MoE", "SmolLM3"}),
    "clipping": frozenset({"OLMoE"}),
    "router": frozenset({"DeepSeek-V3", "Moonlight", "Kimi-K2", "GLM-4.5", "GLM-4.7-Flash", "dots.llm1", *HYBRIDS}),
    "swiglu": frozenset({"GPT-OSS"}),
    "both directions": frozenset({"Gemma 2", "Gemma 3"}),
    "scales": frozenset(),
}
WITHOUT_A_SWITCH = (  # for biases that its mappings do not take
    *(
        "MiMo",
        "Qwen2.5",
        "Qwen1.5-MoE",
        "Mixtral",
        "Mistral, window of 5",
        "GLM-4.5",
        "GPT-OSS",
        "GLM-4",
        "Phi-3",
        "Phi-4-mini",
    ),
    *("Exaone 4", "Exaone 4 without windows", "MiniMax-M2", "GLM-4, old", "Ministral 3"),
)


def ropes_of(model: "Checkpoint") -> Mapping[str, Mapping[str, Any]]:
    """The kinds of `ROPES` that transformers takes for the architecture."""
    if not model.name.startswith("Phi"):
        return ROPES
    width = model.fields["hidden_size"] / model.fields["num_attention_heads"]
    turned = int(width * model.fields["rope_parameters"]["partial_rotary_factor"]) // 2
    return {"longrope": {"rope_type": "longrope", "short_factor": [1.0] * turned, "long_factor": [2.0] * turned}}


def spelled_new(fields: Fields, rope: Mapping[str, Any]) -> Fields:
    """`rope_parameters`, for each kind of layer where the model has kinds."""
    held = fields["rope_parameters"]
    if "full_attention" in held:
        return {**fields, "rope_parameters": {kind: {**old, **rope} for kind, old in held.items()}}
    kept = {name: held[name] for name in ("rope_theta", "partial_rotary_factor") if name in held}
    return {**fields, "rope_parameters": {**kept, **rope}}


def spelled_old(fields: Fields, rope: Mapping[str, Any]) -> Fields:
    """`rope_scaling` and `type`, beside a `rope_theta` at the top."""
    made = ("layer_types",) if fields.get("sliding_window") else ()  # by transformers, of the window
    rest = {name: value for name, value in fields.items() if name not in ("rope_parameters", *made)}
    scaling = {{"rope_type": "type"}.get(name, name): value for name, value in rope.items()}
    turned = {
        name: fields["rope_parameters"][name]
        for name in ("partial_rotary_factor",)
        if name in fields["rope_parameters"]
    }
    return {**rest, **turned, "rope_theta": 1e4, "rope_scaling": scaling}


class Checkpoint:
    """A checkpoint of a tiny model, and what an export of it with the model's own config.json writes."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self._root = root
        self._count = 0
        self.fields: Fields = copy.deepcopy(json.loads(TINY_MODELS[name].make().to_json_string(use_diff=False)))
        if self.fields.get("head_dim", 0) is None:  # transformers checks the factors of `longrope` with it
            self.fields["head_dim"] = self.fields["hidden_size"] // self.fields["num_attention_heads"]
        own = self.described(self.fields)
        self.checkpoint = write_state(root / "checkpoint", megatron_state(own))
        self.exported = self.export(own)

    def described(self, fields: Fields) -> HFModel:
        self._count += 1
        directory = self._root / f"hf{self._count}"
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(fields))
        (directory / "tokenizer_config.json").write_text("{}")
        return read_hf_model(directory)

    def export(self, hf: HFModel) -> Fields:
        """The exported tensors by name, and the exported config.json."""
        output = self._root / f"out{self._count}"
        AutoBridge(hf).convert_checkpoint(self.checkpoint, output, scheme="none")
        return {"tensors": tensors_in(output), "config": json.loads((output / "config.json").read_text())}

    def check(self, fields: Fields) -> HFModel:
        """Exports with another config.json: the dry run and the run agree, and nothing else changes."""
        hf = self.described(fields)
        planned = plan_on_mesh(hf, Mesh(), self._root / "planned", scheme="none").export.layout.weight_map
        made = self.export(hf)
        assert planned.keys() == made["tensors"].keys() == self.exported["tensors"].keys()
        assert all(torch.equal(tensor, self.exported["tensors"][name]) for name, tensor in made["tensors"].items())
        for field, value in fields.items():
            if field != "dtype":  # that of what was written
                assert made["config"][field] == value, field
        assert made["config"]["dtype"] == self.exported["config"]["dtype"]
        return hf


@pytest.fixture(scope="module", params=FAMILY_MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(request.param, tmp_path_factory.mktemp("variants"))


def refused(hf: HFModel) -> bool:
    """True if neither a plan nor a model can be made; both refusals must have the same message."""
    try:
        hf.family.check_buildable(hf.config)
    except UsageError as error:
        with pytest.raises(UsageError) as of_plan:
            plan_import(hf, Mesh())
        assert str(of_plan.value) == str(error)
        return True
    return False


@pytest.mark.parametrize("spelled", [spelled_new, spelled_old])
def test_a_rotary_embedding_never_stops_an_export(
    model: Checkpoint, spelled: Callable[[Fields, Mapping[str, Any]], Fields]
) -> None:
    seen = 0
    ropes = dict(islice(ropes_of(model).items(), None if spelled is spelled_new else 2))  # one spelling for all kinds
    for kind, rope in ropes.items():
        if "rope_parameters" not in model.fields:
            assert model.name in HYBRIDS
            return
        hf = model.check(spelled(model.fields, rope))
        assert refused(hf) or kind in ("yarn", "linear"), kind
        seen += 1
    assert seen == len(ropes)


def test_what_is_computed_never_stops_an_export(model: Checkpoint) -> None:
    seen = 0
    for kind, changes in COMPUTED.items():
        known = {name: value for name, value in changes.items() if name in model.fields}
        if not known:
            assert model.name not in NOT_BUILT[kind], kind
            continue
        never = bool(TINY_MODELS[model.name].unbuildable)
        assert refused(model.check({**model.fields, **known})) == (never or model.name in NOT_BUILT[kind]), kind
        seen += 1
    assert seen


def test_weights_that_no_mapping_takes_are_refused_by_both(model: Checkpoint) -> None:
    """Biases, in architectures whose configuration can switch them on."""
    seen = 0
    for field in ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias"):
        if model.fields.get(field) is not False:
            continue
        hf = model.described({**model.fields, field: True})
        messages = set[str]()
        attempts: list[Callable[[], object]] = [
            lambda hf=hf: AutoBridge(hf).convert_checkpoint(model.checkpoint, model.checkpoint / "out"),
            lambda hf=hf: plan_on_mesh(hf, Mesh(), model.checkpoint / "out"),
        ]
        if not TINY_MODELS[model.name].unbuildable:  # which an import says first
            attempts.append(lambda hf=hf: plan_import(hf, Mesh()))
        for attempt in attempts:
            with pytest.raises(UsageError, match=f"with {field}=True has weights that the mappings") as error:
                attempt()
            messages.add(str(error.value))
        assert len(messages) == 1
        seen += 1
    assert seen or model.name in WITHOUT_A_SWITCH


def test_every_family_has_a_model_here() -> None:
    architectures = {TINY_MODELS[name].make().architectures[0] for name in FAMILY_MODELS}
    others = {family.architectures[0] for family in FAMILIES if family.carried}
    assert architectures | others == {family.architectures[0] for family in FAMILIES}


def test_a_rotary_embedding_without_its_numbers(tmp_path: Path) -> None:
    fields = json.loads(TINY_MODELS["Qwen3"].make().to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps({**fields, "rope_parameters": {"rope_type": "yarn"}}))
    with pytest.raises(UsageError, match=r"by transformers [0-9.]+: Missing required keys .*'yarn'.*; correct it"):
        read_hf_model(tmp_path)
