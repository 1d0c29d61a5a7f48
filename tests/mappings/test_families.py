"""Published models at their full size, on the meta device: an export has the names and shapes of transformers' files.

`tests/published_models/` holds config.json as published. Once from the side of Hugging Face: each name of a checkpoint
must lead to a Megatron parameter, and all these parameters together must write exactly those names. And once from the
side of Megatron: what an export of the real model, built at that size, plans to write.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from amaxbridge.bridge.hf import HFModel, check_parallel_sizes
from amaxbridge.bridge.plan.tensor_specs import hf_tensors
from amaxbridge.export.disk.packed_experts import ExpertPacker
from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import FAMILIES, family_of
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.names import kind_of
from amaxbridge.mappings.tensors import TensorSpec
from tests.support.launcher import Launcher
from tests.support.paths import PUBLISHED_MODELS, WORKERS
from tests.support.published_models import NOT_BUILT, PARAMETERS, published
from tests.support.tiny_models import LLAMA3, TINY_MODELS, YARN


def hf_model(config: Any) -> HFModel:
    fields = config.to_dict()
    return HFModel(Path(), fields, fields, family_of(fields))


def packed(hf: HFModel, tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """The names that files hold, with packed experts where the family packs them."""
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    return ExpertPacker(specs, hf.family.packed_experts).specs if hf.family.packed_experts else specs


def assert_names_close(hf: HFModel, tensors: Mapping[str, Tensor]) -> None:
    """Every name leads to a Megatron parameter, and those write exactly the names.

    Shapes for one parameter of each kind: layers and experts of a kind are alike.
    """
    shapes = {kind_of(name): tensor.shape for name, tensor in tensors.items()}
    assert all(tensor.shape == shapes[kind_of(name)] for name, tensor in tensors.items())
    found = {name: hf.registry.hf_to_megatron_lookup(name) for name in tensors}
    assert not [name for name, mapping in found.items() if mapping is None]
    written: list[str] = []
    examples: dict[str, MegatronParamMapping] = {}
    for name in {mapping.megatron_param for mapping in found.values() if mapping is not None}:
        mapping = hf.registry.megatron_to_hf_lookup(name)
        assert mapping is not None, name
        written += mapping.targets
        examples[kind_of(name)] = mapping
    assert sorted(written) == sorted(tensors)
    sizes = hf.model_config
    for mapping in examples.values():
        joined = mapping.join([mapping.split(tensors, sizes, 0, 1)], sizes)
        assert {name: tensor.shape for name, tensor in joined.items()} == {
            name: tensors[name].shape for name in mapping.targets
        }


LARGE = {  # five seconds and more each to build; the live names of their families are those of tiny models and others
    "HY-V3", "Kimi-K2-Instruct", "Kimi-K2.5", "MiniMax-M2.5", "Nemotron-3-Super-120B-A12B", "Qwen3-235B-A22B",
    "Qwen3-Coder-Next-E336", "Qwen3.5-35B-A3B", "Qwen3.5-35B-A3B-text",
}  # fmt: skip


@pytest.fixture(scope="module")
def plans(launch: Launcher, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What exports of live Megatron models would write: model → name → shape. Or why one is not built.

    Of the models whose tests were selected; of `LARGE` only those of a family that was asked for (`make family`).
    """
    out = tmp_path_factory.mktemp("published") / "plans.json"
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    chosen = {str(call.params["name"]) for call in calls if call and "name" in call.params}
    names = PARAMETERS.keys() & chosen - (set() if request.config.getoption("family") else LARGE)
    launch(WORKERS / "live_published.py", out, *sorted(names))
    planned: dict[str, Any] = json.loads(out.read_text())
    return planned


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_published_model(name: str, plans: Mapping[str, Any]) -> None:
    hf = hf_model(published(name))
    tensors = hf_tensors(hf)
    after = ["mtp."] + [
        f"model.layers.{hf.config.get('num_hidden_layers', 0) + n}."
        for n in range(8)
        if "num_hidden_layers" in hf.config
    ]
    count = sum(tensor.numel() for name, tensor in tensors.items() if not name.startswith(("mtp.", *after)))
    known = PARAMETERS[name]
    assert known == (f"{count / 1e9:.0f}B" if isinstance(known, str) else count)
    assert_names_close(hf, tensors)
    if name not in plans:
        assert name in LARGE
    elif name in NOT_BUILT:
        assert NOT_BUILT[name] in plans[name]
    else:
        assert plans[name] == {name: list(spec.shape) for name, spec in packed(hf, tensors).items()}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_tiny_model(name: str) -> None:
    hf = hf_model(TINY_MODELS[name].make())
    assert_names_close(hf, hf_tensors(hf))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Llama-3.1-8B", {"rope_parameters": {**LLAMA3, "high_freq_factor": 8.0}}, "scales only as rope_type 'llama3'"),
        ("Qwen2.5-7B", {"rope_parameters": YARN}, "scales only as rope_type 'llama3'"),
        ("Qwen2.5-7B", {"use_sliding_window": True}, "Qwen2ForCausalLM with use_sliding_window=True has no equal"),
        ("Llama-2-7B", {"attention_bias": True, "mlp_bias": True}, "attention_bias=True, mlp_bias=True has weights"),
        ("OLMoE-1B-7B", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ("GPT-OSS-20B", {"swiglu_alpha": 1.0}, "swiglu_alpha=1.0"),
        ("GPT-OSS-20B", {"rope_parameters": LLAMA3}, "rope_type='llama3'"),
        ("Gemma-2-9B", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ("Gemma-2-9B", {"rope_parameters": YARN}, "scales only as rope_type 'llama3'"),
        ("Gemma-3-1B", {"use_bidirectional_attention": True}, "earlier tokens only"),
        ("Gemma-3-1B", {"rope_parameters": {"full_attention": YARN, "sliding_attention": YARN}}, "and linearly"),
    ],
)
def test_what_megatron_does_not_compute_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    hf = hf_model(published(name))
    with pytest.raises(UsageError, match=message):
        hf.family.transformer_config({**hf.config, **changes})
        hf.family.model_arguments({**hf.config, **changes})


def test_llama_3_scales_its_rotary_embedding() -> None:
    hf = hf_model(published("Llama-3.2-1B"))
    arguments = hf.family.model_arguments(hf.config)
    assert (arguments["rope_scaling"], arguments["rope_scaling_factor"]) == (True, 32.0)
    assert hf.family.model_arguments({**hf.config, "rope_parameters": {"rope_theta": 1e4}})["rope_scaling"] is False


def test_tensor_parallelism_must_divide_shared_experts() -> None:
    hf = hf_model(published("DeepSeek-V3"))
    narrow = {**hf.config, "moe_intermediate_size": 2047}
    with pytest.raises(UsageError, match="TP=2 does not divide the shared experts' width of 2047"):
        check_parallel_sizes(HFModel(hf.directory, narrow, narrow, hf.family), world=2, tp=2, pp=1, etp=1)


def test_experts_with_biases_are_not_cut() -> None:
    hf = hf_model(published("GPT-OSS-20B"))
    check_parallel_sizes(hf, world=2, tp=2, pp=1, etp=1)
    with pytest.raises(UsageError, match="ETP=2 and experts with biases, which Megatron has at ETP=1 only"):
        check_parallel_sizes(hf, world=2, tp=2, pp=1)


def test_every_family_is_here() -> None:
    known = {path.stem for path in PUBLISHED_MODELS.iterdir()}
    assert known == PARAMETERS.keys()
    configs = [json.loads((PUBLISHED_MODELS / f"{name}.json").read_text()) for name in known]
    models = {architecture for config in configs for architecture in config["architectures"]}
    tiny = {architecture for model in TINY_MODELS.values() for architecture in model.make().architectures}
    for family in FAMILIES:
        assert set(family.architectures) <= models, f"tests/published_models has none of {family.architectures}"
        assert set(family.architectures) <= tiny, f"tiny_models.py has no row for {family.architectures}"
