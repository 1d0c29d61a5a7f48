"""Checkpoints with adapters: merged on export, to the bit as PEFT merges them."""

from pathlib import Path

import pytest
import torch

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.bridge.plan.tensor_specs import hf_tensors
from amaxbridge.mappings.errors import CheckpointError, MappingError, UsageError
from tests.support.adapters import ALPHA, RANK, Adapted, adapters_for, merged_by_peft
from tests.support.comparing import same_tensors
from tests.support.stored_checkpoints import megatron_state, write_state
from tests.support.tiny_models import TINY_MODELS

KINDS = ("lora", "dora", "canonical", "modelopt")
MODELS = ("Qwen3", "Llama 3, tied", "Qwen1.5-MoE", "DeepSeek-V3", "Phi-3", "GPT-OSS", "Nemotron-H", "Mixtral")
RUN_CONFIG = f"""
peft:
  _target_: megatron.bridge.peft.lora.LoRA
  alpha: {ALPHA:g}
  dim: {RANK}
  dropout: 0.1
  lora_dtype:
    _target_: torch.bfloat16
    _call_: false
checkpoint:
  pretrained_checkpoint: /some/where
"""


def one_by_one(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a directory, its experts one by one."""
    bridge = AutoBridge.from_hf_pretrained(directory)
    with bridge.open_weights() as weights:
        return {name: weights.read(name) for name in hf_tensors(bridge.hf) if name not in bridge.hf.tied_head}


class Road:
    """A checkpoint of a tiny model, its config.json, and its plain export."""

    def __init__(self, name: str, root: Path) -> None:
        self.root, self.hf, self.plain = root, root / "hf", root / "plain"
        TINY_MODELS[name].make().save_pretrained(self.hf)
        self.model = read_hf_model(self.hf)
        self.state = megatron_state(self.model)
        self.base = write_state(root / "base", self.state)
        AutoBridge.from_hf_pretrained(self.hf).convert_checkpoint(self.base, self.plain, scheme="none")

    def write(self, directory: Path, adapted: Adapted, *, whole: bool = True, config: str = RUN_CONFIG) -> Path:
        write_state(directory, {**(self.state if whole else {}), **adapted.megatron})
        (directory / "iter_0000005" / "run_config.yaml").write_text(config)
        return directory


@pytest.fixture(scope="module", params=MODELS)
def road(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Road:
    return Road(request.param, tmp_path_factory.mktemp("road"))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_by_peft(road: Road, kind: str, tmp_path: Path) -> None:
    adapted = adapters_for(road.model, kind)
    config = RUN_CONFIG.replace("lora.LoRA", "dora.DoRA") if kind == "dora" else RUN_CONFIG
    checkpoint = road.write(tmp_path / "checkpoint", adapted, config=config)
    bridge = AutoBridge.from_hf_pretrained(road.hf)
    bridge.convert_checkpoint(checkpoint, tmp_path / "out", scheme="none", adapter="merge")
    plain, written = one_by_one(road.plain), one_by_one(tmp_path / "out")
    expected = merged_by_peft(plain, adapted)
    assert len(expected) >= 8
    for module, weight in expected.items():
        name = f"{module}.weight"
        assert torch.equal(written[name], weight.to(written[name].dtype)), name
        assert not torch.equal(written[name], plain[name]), name
    for name in plain.keys() - {f"{module}.weight" for module in expected}:
        assert torch.equal(written[name], plain[name]), name


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Road:
    return Road("Qwen3", tmp_path_factory.mktemp("qwen3"))


def refused(road: Road, checkpoint: Path, output: Path, **options: object) -> str:
    """The message of an export that is refused, before anything is written."""
    with pytest.raises((CheckpointError, MappingError, UsageError)) as error:
        AutoBridge.from_hf_pretrained(road.hf).convert_checkpoint(
            checkpoint,
            output,
            **{"scheme": "none", "adapter": "merge", **options},  # type: ignore[arg-type]
        )
    assert not output.exists()
    assert not output.with_name(f"{output.name}.partial").exists()
    return str(error.value)


def test_adapters_saved_alone_and_their_model_elsewhere(qwen3: Road, tmp_path: Path) -> None:
    """The weights of hf=, another checkpoint, or the same one: the same bytes."""
    adapted = adapters_for(qwen3.model, "lora")
    whole = qwen3.write(tmp_path / "whole", adapted)
    alone = qwen3.write(tmp_path / "alone", adapted, whole=False)
    for source, hf, output, options in (
        (whole, qwen3.hf, "one", {}),
        (alone, qwen3.hf, "two", {"adapter_base": str(qwen3.base)}),
        (alone, qwen3.plain, "three", {}),
    ):
        bridge = AutoBridge.from_hf_pretrained(hf)
        bridge.convert_checkpoint(source, tmp_path / output, scheme="none", adapter="merge", **options)  # type: ignore[arg-type]
    same_tensors(tmp_path / "one", tmp_path / "two")
    same_tensors(tmp_path / "one", tmp_path / "three")
    assert "14 weights have their LoRA adapters merged in" in (tmp_path / "one" / "README.md").read_text()
    message = refused(qwen3, alone, tmp_path / "none")
    assert "holds adapters alone: give adapter.base=" in message
    assert "run_config.yaml names /some/where" in message
    assert "leave it out" in refused(qwen3, whole, tmp_path / "twice", adapter_base=str(qwen3.base))


def test_to_wrap_in_names(qwen3: Road, tmp_path: Path) -> None:
    """Frameworks that save a module's own names keep `to_wrap` in them."""
    adapted = adapters_for(qwen3.model, "lora")
    state = {name.replace(".linear_qkv.", ".linear_qkv.to_wrap."): tensor for name, tensor in qwen3.state.items()}
    for name, tensors in (("one", qwen3.state), ("two", state)):
        write_state(tmp_path / f"{name}_ckpt", {**tensors, **adapted.megatron})
        AutoBridge.from_hf_pretrained(qwen3.hf).convert_checkpoint(
            tmp_path / f"{name}_ckpt", tmp_path / name, scheme="none", adapter="merge", adapter_alpha=ALPHA
        )
    same_tensors(tmp_path / "one", tmp_path / "two")


def test_what_is_refused(qwen3: Road, tmp_path: Path) -> None:
    adapted = adapters_for(qwen3.model, "lora")
    good = qwen3.write(tmp_path / "good", adapted)
    output = tmp_path / "out"

    def changed(name: str, change: dict[str, torch.Tensor | None], config: str = RUN_CONFIG) -> Path:
        made = {**adapted.megatron, **change}
        kept = Adapted({key: tensor for key, tensor in made.items() if tensor is not None})
        return qwen3.write(tmp_path / name, kept, config=config)

    fc1 = "decoder.layers.0.mlp.linear_fc1.adapter"
    cases = {
        "adapter=merge writes the weights with them merged in": (good, {"adapter": None}),
        "adapter=only writes them alone": (good, {"adapter": None}),
        "adapter=both: give adapter=merge or adapter=only": (good, {"adapter": "both"}),
        "adapter.base= is for adapter=merge": (good, {"adapter": "only", "adapter_base": str(qwen3.base)}),
        "adapter=None: give adapter=merge": (good, {"adapter": None, "adapter_alpha": 2.0}),
        "adapter.alpha=7 contradicts": (good, {"adapter_alpha": 7.0}),
        "adapter= is given, but there are no adapters": (qwen3.base, {"adapter_alpha": 7.0}),
        f"{fc1}: has no lora_B": (changed("no_b", {f"{fc1}.linear_out.weight": None}), {}),
        "are those of adapters (LoRA)": (changed("odd", {f"{fc1}.linear_in.bias": torch.ones(4)}), {}),
        "has rank 4, but": (changed("rank", {}, "peft: {_target_: a.LoRA, alpha: 2, dim: 8}"), {}),
        "has no lengths (weight_magnitude), but": (changed("dora", {}, "peft: {_target_: a.DoRA, alpha: 2}"), {}),
        "are of an unknown kind": (changed("peft", {f"{fc1[:-8]}.lora_A.x.weight": torch.ones(4)}), {}),
        "peft is Prefix; known are LoRA": (changed("kind", {}, "peft: {_target_: a.Prefix, alpha: 2}"), {}),
        "peft.alpha is 'x', not a number": (changed("alpha", {}, "peft: {_target_: a.LoRA, alpha: x}"), {}),
        "nothing says how strongly": (changed("silent", {}, "peft:"), {}),
        "cannot be read": (changed("broken", {}, "peft: ["), {}),
        "lora_A of model.layers.0.mlp.gate_proj.weight [96, 64] bfloat16 is [4, 32] bfloat16, not [4, 64]": (
            changed("width", {f"{fc1}.linear_in.weight": torch.ones(4, 32).bfloat16()}),
            {},
        ),
        "is [4, 64] float8_e4m3fn": (
            changed("fp8", {f"{fc1}.linear_in.weight": torch.ones(4, 64).to(torch.float8_e4m3fn)}),
            {},
        ),
    }
    for expected, (checkpoint, options) in cases.items():
        assert expected in refused(qwen3, checkpoint, output, **options), expected


def test_a_part_of_a_weight_that_the_files_hold_in_one(tmp_path: Path) -> None:
    road = Road("Phi-3", tmp_path)
    a = torch.ones(RANK, 64).bfloat16()
    b = torch.ones(64, RANK).bfloat16()
    qkv = "decoder.layers.0.self_attention.linear_qkv.adapter.adapter_q"
    parts = Adapted({f"{qkv}.linear_in.weight": a, f"{qkv}.linear_out.weight": b})
    message = refused(road, road.write(tmp_path / "checkpoint", parts), tmp_path / "out")
    assert "which the files hold in one tensor, model.layers.0.self_attn.qkv_proj.weight" in message


@pytest.mark.parametrize("name", ["GPT-OSS", "Llama 3, tied", "Qwen1.5-MoE"])
def test_the_weights_of_a_directory_as_the_model(name: str, tmp_path: Path) -> None:
    """Packed experts, tied embeddings and biases are those of the checkpoint that the directory was exported from."""
    road = Road(name, tmp_path)
    adapted = adapters_for(road.model, "lora")
    whole, alone = road.write(tmp_path / "whole", adapted), road.write(tmp_path / "alone", adapted, whole=False)
    for source, hf, output in ((whole, road.hf, "one"), (alone, road.plain, "two")):
        AutoBridge.from_hf_pretrained(hf).convert_checkpoint(source, tmp_path / output, scheme="none", adapter="merge")
    same_tensors(tmp_path / "one", tmp_path / "two")


def in_one(adapted: Adapted, layers: range, experts: range) -> dict[str, torch.Tensor]:
    """Adapters of grouped experts as one tensor of all layers and experts, and others as one of all layers."""
    kinds: dict[str, dict[tuple[int, int], torch.Tensor]] = {}
    for name, tensor in adapted.megatron.items():
        layer, expert = int(name.split(".")[2]), name.partition(".experts.experts.")[2].partition(".")[0]
        kind = name.replace(f".layers.{layer}.", ".layers.").replace(f".experts.experts.{expert}.", ".experts.experts.")
        kinds.setdefault(kind, {})[layer, int(expert or 0)] = tensor
    made = {}
    for kind, tensors in kinds.items():
        among = experts if ".experts." in kind else range(1)
        stacked = torch.stack([torch.stack([tensors[layer, each] for each in among]) for layer in layers])
        made[kind] = stacked if ".experts." in kind else stacked[:, 0]
    return made


def test_experts_of_grouped_linears(tmp_path: Path) -> None:
    """One tensor of all layers and experts, as Transformer Engine's grouped linears save them; sides that all share."""
    road = Road("Qwen3-MoE", tmp_path)
    adapted = adapters_for(road.model, "lora")
    bridge = AutoBridge.from_hf_pretrained(road.hf)

    def merged(name: str, megatron: dict[str, torch.Tensor]) -> Path:
        checkpoint = road.write(tmp_path / f"{name}_ckpt", Adapted(megatron))
        bridge.convert_checkpoint(checkpoint, tmp_path / name, scheme="none", adapter="merge")
        return tmp_path / name

    each = merged("each", adapted.megatron)
    grouped = in_one(adapted, range(2), range(8))
    assert len(grouped) == 8
    same_tensors(merged("grouped", grouped), each)
    a, b = (f"decoder.layers.mlp.experts.experts.linear_fc1.adapter.linear_{side}.weight" for side in ("in", "out"))
    of_all = {**grouped, a: grouped[a][:, :1].expand(-1, 8, -1, -1).contiguous()}
    same_tensors(merged("shared_side", {**grouped, a: grouped[a][:, 0]}), merged("copies", of_all))
    both = {**grouped, a: grouped[a][:, 0], b: grouped[b][:, 0]}
    message = refused(road, road.write(tmp_path / "older", Adapted(both)), tmp_path / "none")
    assert "experts share them without an axis of experts" in message


def test_a_checkpoint_of_fsdp(qwen3: Road, tmp_path: Path) -> None:
    """Gate and up apart, the module's own names, and the wrapper's before them."""
    adapted = adapters_for(qwen3.model, "lora")
    state = {}
    for name, tensor in qwen3.state.items():
        wrapped = name.replace(".linear_qkv.", ".linear_qkv.to_wrap.").replace(".linear_fc1.", ".linear_fc1.to_wrap.")
        if "linear_fc1" in name:
            gate, up = tensor.float().chunk(2)
            state |= {f"{wrapped}_w": gate, f"{wrapped}_v": up}
        else:
            state[wrapped] = tensor.float()
    named = {f"model.module.{name}": tensor for name, tensor in {**state, **adapted.megatron}.items()}
    write_state(tmp_path / "fsdp", named)
    checkpoint = qwen3.write(tmp_path / "torch_dist", adapted)
    bridge = AutoBridge.from_hf_pretrained(qwen3.hf)
    for source, output in ((tmp_path / "fsdp", "one"), (checkpoint, "two")):
        how = {"scheme": "none", "dtype": "bfloat16", "adapter": "merge"}
        alpha = ALPHA if output == "one" else None
        bridge.convert_checkpoint(source, tmp_path / output, adapter_alpha=alpha, **how)  # type: ignore[arg-type]
    same_tensors(tmp_path / "one", tmp_path / "two")
