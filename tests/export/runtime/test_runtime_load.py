"""Checkpoints read back by the runtime: against transformers, against Megatron, and what is refused."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.export.runtime import CompressedLinear, load_linear, load_model_
from amaxbridge.export.schemes import SCHEMES, Groups, Scheme
from amaxbridge.export.schemes.recipe import SchemeGroup
from amaxbridge.export.schemes.w4a16 import w4a16
from amaxbridge.mappings.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from tests.support.launcher import LiveRanks

TOKENS = torch.arange(1, 33).reshape(2, 16) * 3
SOME: dict[str, Scheme] = {
    **{name: SCHEMES[name] for name in ("nvfp4", "nvfp4a16", "mxfp4", "mxfp8a16", "fp8", "fp8_dynamic", "w8a8")},
    "w4a16": w4a16(32),  # 128 does not divide the sizes of the tiny model
}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.1.mlp"

Q = f"{ATTENTION}.q_proj"


@pytest.fixture(scope="module")
def quantized(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model under a scheme, quantized when first asked for."""
    root = tmp_path_factory.mktemp("runtime")
    modules = [name.removesuffix(".weight") for name in load_file(qwen3 / "model.safetensors") if "_proj" in name]
    numbers = {"weight": 0.875, "input": 7.0}  # whose scales bf16 can hold, to which transformers rounds them
    amax = {f"{m}.{part}_quantizer._amax": torch.tensor(number) for m in modules for part, number in numbers.items()}

    def make(name: str) -> Path:
        scheme = SOME[name]
        state = QuantState(amax, dict.fromkeys(modules, scheme.format)) if scheme.needs_input_amax else None
        if not (root / name).exists():
            model_free_ptq(qwen3, root / name, Groups.of(scheme), quant_state=state)
        return root / name

    return make


def empty_model(directory: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    found: Tensor = model(tokens).logits
    return found


def error(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


# Whole models


@pytest.mark.parametrize("name", SOME)
def test_logits_are_those_of_transformers(name: str, quantized: Callable[[str], Path], qwen3: Path) -> None:
    """Bit for bit: in bf16 where inputs are not quantized, in fp32 where they are, see `test_megatron`."""
    from transformers import AutoModelForCausalLM

    directory, scheme = quantized(name), SOME[name]
    weights_only = scheme.config_group["input_activations"] is None
    dtype = torch.bfloat16 if weights_only else torch.float32
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    logits(theirs)  # compressed-tensors decompresses on the first call, always to bf16
    if not weights_only:
        nn.Module.float(theirs)
    ours = empty_model(directory, dtype)
    load_model_(ours, directory)
    assert sum(isinstance(module, CompressedLinear) for module in ours.modules()) == 14
    found, expected = logits(ours), logits(theirs)
    plain = logits(AutoModelForCausalLM.from_pretrained(qwen3))
    assert error(found, plain) > 0.01, "quantization must matter here"
    if name == "w8a8":  # compressed-tensors divides by 127.5 and rounds half to even, engines by 127 and half away
        assert error(found, expected) < 0.05
    else:
        assert torch.equal(found, expected)


def test_logits_are_those_of_megatron(live: "LiveRanks") -> None:
    """The whole road: NVFP4 with calibrated inputs, from Megatron's ranks through the disk into plain torch."""
    directory = live.at(tp=2)
    reference = torch.load(directory / "logits.pt")
    model = empty_model(directory / "calibrated", torch.float32)
    load_model_(model, directory / "calibrated")
    assert error(logits(model, reference["tokens"]), reference["nvfp4"]) < 0.01
    assert error(reference["nvfp4"], reference["plain"]) > 0.05


def test_tied_heads_and_models_on_the_meta_device(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(quantized("w4a16"), tmp_path / "tied")
    change(directory, lambda tensors: tensors.pop("lm_head.weight"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = empty_model(directory, torch.bfloat16)
    for name in ("model.norm", "model.layers.0.mlp.up_proj"):
        model.get_submodule(name).to("meta")
    load_model_(model, directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert logits(model).isfinite().all()
    with torch.device("meta"):
        model = empty_model(directory, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"rotary_emb\.inv_freq: in the model only"):
        load_model_(model, directory)


@pytest.mark.parametrize("name", ["nvfp4", "w4a16", "fp8"])
def test_a_cast_of_the_model_leaves_codes_and_scales(name: str, quantized: Callable[[str], Path]) -> None:
    model = empty_model(quantized(name), torch.float32)
    load_model_(model, quantized(name))
    model.bfloat16()
    held = model.model.layers[0].self_attn.q_proj.state_dict()
    again = load_linear(quantized(name), Q).state_dict()
    assert held.keys() == again.keys()
    assert all(held[key].dtype == tensor.dtype and torch.equal(held[key], tensor) for key, tensor in again.items())


def test_several_groups_in_one_checkpoint(qwen3: Path, tmp_path: Path) -> None:
    groups = (
        SchemeGroup(SCHEMES["nvfp4a16"], (r"re:.*\.(q|k|v)_proj$",)),
        SchemeGroup(SCHEMES["w8a8"], (r"re:.*\.o_proj$",)),
        SchemeGroup(SCHEMES["fp8_dynamic"], (r"re:.*mlp\.(gate|up)_proj$",)),
    )
    model_free_ptq(qwen3, tmp_path / "mixed", Groups(groups))
    model = empty_model(tmp_path / "mixed", torch.bfloat16)
    load_model_(model, tmp_path / "mixed")
    layer = model.model.layers[0]
    found = [layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    formats = [module.method.signature.quant_format for module in found[:3]]
    assert formats == ["nvfp4-pack-quantized", "int-quantized", "float-quantized"]
    assert type(found[3]) is nn.Linear
    assert logits(model).isfinite().all()


# One layer


@pytest.mark.parametrize("name", SOME)
def test_a_merged_layer_on_two_ranks_is_its_modules(name: str, quantized: Callable[[str], Path]) -> None:
    directory = quantized(name)
    for fused, members in ((f"{ATTENTION}.qkv_proj", "qkv"), (f"{MLP}.gate_up_proj", ("gate", "up"))):
        parent = fused.rpartition(".")[0]
        alone = [load_linear(directory, f"{parent}.{member}_proj") for member in members]
        x = torch.randn(3, 64).bfloat16()
        ranks = [load_linear(directory, fused, tp_rank=rank, tp_size=2) for rank in range(2)]
        for rank, layer in enumerate(ranks):
            expected = torch.cat([module(x).chunk(2, 1)[rank] for module in alone], 1)
            assert error(layer(x), expected) < 1e-2  # in bf16, sums in another order
            assert torch.equal(layer.dequantized(), torch.cat([each.dequantized().chunk(2)[rank] for each in alone]))


def test_a_layer_cut_along_its_inputs(quantized: Callable[[str], Path]) -> None:
    name = f"{ATTENTION}.o_proj"
    whole = load_linear(quantized("w4a16"), name)
    x = torch.randn(3, 128).bfloat16()
    parts = [load_linear(quantized("w4a16"), name, tp_rank=rank, tp_size=2, tp_dim=1) for rank in range(2)]
    total = sum(part(half) for part, half in zip(parts, x.chunk(2, 1), strict=True))
    assert error(total, whole(x)) < 0.01
    assert "in_features=64, out_features=64, pack-quantized: weights int4 by group of 32" in repr(parts[0])


def test_a_module_that_is_not_quantized_is_a_plain_one(quantized: Callable[[str], Path], qwen3: Path) -> None:
    head = load_linear(quantized("nvfp4"), "lm_head", tp_rank=0, tp_size=1)
    weight = load_file(qwen3 / "model.safetensors")["lm_head.weight"]
    assert type(head) is nn.Linear and torch.equal(head.weight, weight)
    merged = load_linear(qwen3, f"{ATTENTION}.qkv_proj", tp_rank=1, tp_size=2)
    source = load_file(qwen3 / "model.safetensors")
    expected = [source[f"{ATTENTION}.{each}_proj.weight"].chunk(2)[1] for each in "qkv"]
    assert torch.equal(merged.weight, torch.cat(expected))


def test_biases_follow_their_modules(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(quantized("w8a8"), tmp_path / "biased")
    biases = {
        f"{ATTENTION}.{name}_proj.bias": torch.randn(rows).bfloat16()
        for name, rows in zip("qkvo", (128, 64, 64, 64), strict=True)
    }
    change(directory, lambda tensors: tensors.update(biases))
    first, second, *_ = (load_linear(directory, f"{ATTENTION}.qkv_proj", tp_rank=rank, tp_size=2) for rank in range(2))
    expected = [
        torch.cat([biases[f"{ATTENTION}.{name}_proj.bias"].chunk(2)[rank] for name in "qkv"]) for rank in range(2)
    ]
    assert torch.equal(first.bias, expected[0]) and torch.equal(second.bias, expected[1])
    cut = [load_linear(directory, f"{ATTENTION}.o_proj", tp_rank=rank, tp_size=2, tp_dim=1) for rank in range(2)]
    assert torch.equal(cut[0].bias, biases[f"{ATTENTION}.o_proj.bias"]) and cut[1].bias is None
    change(directory, lambda tensors: tensors.pop(f"{ATTENTION}.k_proj.bias"))
    with pytest.raises(CheckpointError, match=r"k_proj\.bias is missing, but .*q_proj\.bias"):
        load_linear(directory, f"{ATTENTION}.qkv_proj")


# What is refused


def change(directory: Path, how: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    how(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda t: t.pop(f"{Q}.weight_global_scale"), r"qkv_proj: 1 tensors were never loaded:\n  weight_global_scale"),
        (lambda t: t.update({f"{Q}.input_scale": torch.ones(1)}), "input_scale is no tensor of nvfp4-pack"),
        (lambda t: t.update({f"{Q}.weight_global_scale": torch.ones(1)}), "weight_global_scale differs"),
        (lambda t: t.update({"model.extra.weight": torch.ones(1)}), "model.extra.weight: in the checkpoint only"),
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight: in the model only"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model\.norm\.weight: the checkpoint has \[3\]"),
    ],
)  # fmt: skip
def test_checkpoints_that_engines_would_load_in_silence(
    how: Callable[[dict[str, Tensor]], object], message: str, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(quantized("nvfp4"), tmp_path / "broken")
    change(directory, how)
    with pytest.raises(CheckpointError, match=message):
        load_linear(directory, f"{ATTENTION}.qkv_proj")  # merged, as an engine has it
        load_model_(empty_model(directory, torch.bfloat16), directory)


def test_cache_scales_are_not_dropped_in_silence(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(quantized("w8a8"), tmp_path / "cache")
    change(directory, lambda tensors: tensors.update({f"{ATTENTION}.k_scale": torch.ones(1)}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_model_(empty_model(directory, torch.bfloat16), directory)
    assert any("1 scales of a quantized key-value cache" in str(warning.message) for warning in caught)


def test_names_and_sizes_that_do_not_fit(quantized: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no tensors of model\.layers\.7\.mlp\.gate_proj, model.layers.7.mlp.up_proj"
    ):
        load_linear(quantized("w8a8"), "model.layers.7.mlp.gate_up_proj")
    with pytest.raises(UsageError, match=r"o_proj: sizes \[64\] do not divide into 3 ranks"):
        load_linear(quantized("w8a8"), f"{ATTENTION}.o_proj", tp_size=3)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        (shutil.copytree(quantized("w8a8"), tmp_path / "bare") / "config.json").unlink()
        load_linear(tmp_path / "bare", f"{ATTENTION}.o_proj")
