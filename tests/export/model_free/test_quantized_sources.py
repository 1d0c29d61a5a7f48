"""Sources that are quantized already: recognised wherever they say it, dequantized to the bit, or kept."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amaxbridge.export import model_free_ptq
from amaxbridge.export.schemes import SCHEMES, Groups, named_scheme
from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.fused_groups import group_of
from tests.support import quantized_sources as held
from tests.support.checkpoints import DENSE, dense_model, tensors_of, write_checkpoint
from tests.support.hard_weights import of_module
from tests.support.in_memory import expected, same
from tests.support.quantized_sources import Held

type Hold = Callable[[Tensor], Held]

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "checkpoint_format": "gptq"}

KINDS: dict[str, tuple[Hold, dict[str, Any]]] = {
    "fp8 blocks": (held.blocks_of_fp8, FP8),
    "fp8 blocks, e8m0": (partial(held.blocks_of_fp8, e8m0=True), FP8),
    "fp8 blocks, .scale in e8m0": (partial(held.blocks_of_fp8, e8m0=True, name="scale"), FP8),
    "fp8 per tensor, as Mistral": (
        partial(held.fp8_per_tensor, name="weight_scale_inv", static="activation_scale"),
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
    ),
    "modelopt nvfp4": (held.nvfp4, MODELOPT),
    "modelopt nvfp4, weights alone": (partial(held.nvfp4, static=False), MODELOPT),
    "modelopt nvfp4 after awq": (partial(held.nvfp4, factors=True), MODELOPT),
    "modelopt fp8": (held.fp8_per_tensor, MODELOPT),
    "modelopt fp8 per row": (held.fp8_per_row, MODELOPT),
    "modelopt mxfp4": (held.mxfp4, MODELOPT),
    "modelopt int4 awq": (held.int4_of_modelopt, MODELOPT),
    "modelopt int8": (held.int8_of_modelopt, MODELOPT),
    "awq": (held.awq, AWQ),
    "awq without zero points": (partial(held.awq, zero_point=False), {**AWQ, "zero_point": False}),
    "gptq": (held.gptq, GPTQ),
    "gptq symmetric": (partial(held.gptq, symmetric=True), GPTQ),
    "gptq of sorted columns": (partial(held.gptq, order=True), {**GPTQ, "desc_act": True}),
    "gptq, 8 bits": (partial(held.gptq, bits=8), {**GPTQ, "bits": 8}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def source_of(
    directory: Path,
    hold: Hold,
    declared: Mapping[str, Any],
    *,
    config: Mapping[str, Any] = DENSE,
    plain: Mapping[str, Tensor] | None = None,
) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint with `_proj` weights in a format: directory, stored tensors, and what they mean in bf16."""
    stored, meant = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in (plain or dense_model(1)).items():
        if name.endswith("_proj.weight"):
            module = hold(tensor)
            stored |= {name.removesuffix("weight") + local: each for local, each in module.tensors.items()}
            meant[name] = module.weight.to(torch.bfloat16)
        else:
            stored[name] = meant[name] = tensor
    config = {**config, "quantization_config": declared} if declared else config
    return write_checkpoint(directory, stored, config=config), stored, meant


@every_kind
def test_dequantized_to_the_bit(kind: str, tmp_path: Path) -> None:
    """No converter is named; the output is plain, or in another scheme."""
    hold, declared = KINDS[kind]
    source, _, meant = source_of(tmp_path / "in", hold, declared)
    report = model_free_ptq(source, tmp_path / "plain", "none", verify=False)
    same(tensors_of(tmp_path / "plain"), meant)
    assert not report.kept
    assert len(report.formats) == 1
    model_free_ptq(source, tmp_path / "out", "mxfp8")
    same(tensors_of(tmp_path / "out"), expected(meant, "mxfp8"))
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config


KEPT: tuple[tuple[str, str, int | None], ...] = (
    ("fp8 blocks", "fp8_block", None),
    ("fp8 blocks, e8m0", "fp8_block", None),
    ("fp8 blocks, .scale in e8m0", "fp8_block", None),
    ("modelopt nvfp4", "nvfp4", None),
    ("modelopt nvfp4", "nvfp4a16", None),
    ("modelopt nvfp4, weights alone", "nvfp4a16", None),
    ("modelopt fp8 per row", "fp8_dynamic", None),
    ("modelopt mxfp4", "mxfp4a16", None),
    ("modelopt mxfp4", "mxfp4", None),
    ("modelopt mxfp4", "nvfp4a16", None),
    ("modelopt int8", "w8a8", None),
    ("awq", "w4a16_asym", 64),
    ("awq without zero points", "w4a16", 64),
    ("gptq", "w4a16_asym", 64),
    ("gptq symmetric", "w4a16", 64),
)


@pytest.mark.parametrize(("kind", "scheme", "size"), KEPT, ids=str)
def test_kept_without_loss(kind: str, scheme: str, size: int | None, tmp_path: Path) -> None:
    """Where the source is in the scheme asked for: what the output means is what the source means."""
    hold, declared = KINDS[kind]
    source, stored, _ = source_of(tmp_path / "in", hold, declared)
    wanted = named_scheme(scheme, size)
    report = model_free_ptq(source, tmp_path / "out", Groups.of(wanted))
    assert len(report.kept) == 7
    found = tensors_of(tmp_path / "out")
    for module in report.kept:
        weight = hold(dense_model(1)[f"{module}.weight"]).weight
        tensors = of_module(module, found)
        assert torch.equal(wanted.dequantize(tensors, torch.float32), weight) or scheme.startswith("nvfp4")
        if scheme.startswith("nvfp4"):
            divided = tensors["weight_scale"].float() / tensors["weight_global_scale"]
            codes = tensors["weight_packed"]
            assert torch.equal(codes.flatten(), stored[f"{module}.weight"].flatten())
            assert torch.allclose(wanted.dequantize(tensors, torch.float32), weight, rtol=2e-7, atol=0)
            assert divided.isfinite().all()


@pytest.mark.parametrize(
    "kind", ["awq", "gptq", "modelopt nvfp4 after awq", "modelopt int4 awq", "gptq of sorted columns"]
)
def test_not_kept_where_it_would_mean_something_else(kind: str, tmp_path: Path) -> None:
    """Zero points under a symmetric scheme, factors of inputs, sorted columns: dequantized and quantized."""
    hold, declared = KINDS[kind]
    source, _, meant = source_of(tmp_path / "in", hold, declared)
    wanted = Groups.of(named_scheme("w4a16", 64)) if "nvfp4" not in kind else find("nvfp4a16")
    report = model_free_ptq(source, tmp_path / "out", wanted)
    assert not report.kept
    same(tensors_of(tmp_path / "out"), expected(meant, wanted))


def find(name: str) -> Groups:
    return Groups.of(SCHEMES[name])


def test_a_group_that_differs_in_a_shared_scale_is_quantized_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Engines keep one global scale for q, k and v."""
    source, stored, meant = source_of(tmp_path / "in", held.nvfp4, MODELOPT)
    name = "model.layers.0.self_attn.k_proj"
    stored[f"{name}.weight_scale_2"] *= 2
    meant[f"{name}.weight"] = (meant[f"{name}.weight"].float() * 2).bfloat16()
    write_checkpoint(source, stored, config={**DENSE, "quantization_config": MODELOPT})
    report = model_free_ptq(source, tmp_path / "out", "nvfp4a16")
    group = set(group_of(name).members)
    assert len(report.kept) == 4
    assert not group & set(report.kept)
    assert "k_proj" in caplog.text
    wanted = expected({each: tensor for each, tensor in meant.items() if each[:-7] not in report.kept}, "nvfp4a16")
    found = tensors_of(tmp_path / "out")
    same({each: found[each] for each in wanted}, wanted)


def test_fp8_of_a_group_with_several_scales(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As ModelOpt exports it: codes are rounded to the largest, which is what vLLM does when it loads the source."""
    source, _, _ = source_of(tmp_path / "in", held.fp8_per_tensor, MODELOPT)
    report = model_free_ptq(source, tmp_path / "out", "fp8")
    assert len(report.kept) == 7
    assert "5 modules are kept with a change" in caplog.text
    found = tensors_of(tmp_path / "out")
    for module in report.kept:
        made = held.fp8_per_tensor(dense_model(1)[f"{module}.weight"])
        members = [each for each in group_of(module).members if each in report.kept]
        weights = [held.fp8_per_tensor(dense_model(1)[f"{each}.weight"]) for each in members]
        largest = torch.stack([each.tensors["weight_scale"] for each in weights]).max()
        codes = (made.weight / largest).to(torch.float8_e4m3fn)
        assert torch.equal(found[f"{module}.weight"].float(), codes.float()), module
        assert found[f"{module}.weight_scale"].tolist() == [largest.item()]
        assert found[f"{module}.input_scale"].tolist() == [made.tensors["input_scale"].item()]


def test_exponents_that_e4m3_does_not_span(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """MXFP4 becomes NVFP4 as far as powers of two go; blocks of zeros do not count."""

    def hold(weight: Tensor, least: int, zeros: bool) -> Held:
        made = held.mxfp4(weight)
        scale, codes = made.tensors["weight_scale"].clone(), made.tensors["weight"].clone()
        scale[0, 0] = least
        if zeros:
            codes[0, :16] = 0
        powers = torch.exp2(scale.float() - 127).repeat_interleave(32, 1)
        values = held.E2M1[torch.stack((codes & 0xF, codes >> 4), -1).flatten(1).long()]
        return Held({"weight": codes, "weight_scale": scale}, values * powers)

    for least, zeros, count in ((90, False, 0), (90, True, 7), (109, False, 7)):
        at = tmp_path / f"{least} {zeros}"
        source, _, meant = source_of(at / "in", partial(hold, least=least, zeros=zeros), MODELOPT)
        report = model_free_ptq(source, at / "out", "nvfp4a16")
        assert len(report.kept) == count
        found = tensors_of(at / "out")
        if not count:
            assert "powers of two from -37" in caplog.text
            same(found, expected(meant, "nvfp4a16"))
        for module in report.kept:
            weight = SCHEMES["nvfp4a16"].dequantize(of_module(module, found))
            assert torch.equal(weight.float(), meant[f"{module}.weight"].float()), module


# Where a source says it


@pytest.mark.parametrize("kind", ["fp8 blocks", "fp8 blocks, .scale in e8m0", "modelopt nvfp4", "modelopt fp8"])
def test_a_source_that_says_nothing(kind: str, tmp_path: Path) -> None:
    """Its tensors tell the format."""
    hold, _ = KINDS[kind]
    source, _, meant = source_of(tmp_path / "in", hold, {})
    model_free_ptq(source, tmp_path / "out", "mxfp8")
    same(tensors_of(tmp_path / "out"), expected(meant, "mxfp8"))


@pytest.mark.parametrize("file", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_source_that_says_it_in_a_file(file: str, tmp_path: Path) -> None:
    content: dict[str, tuple[str, dict[str, Any]]] = {
        "hf_quant_config.json": (
            "modelopt nvfp4",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}},
        ),
        "quantize_config.json": ("gptq", {"bits": 4, "group_size": 64, "desc_act": False}),
        "quant_config.json": ("awq", {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}),
    }
    kind, said = content[file]
    source, _, meant = source_of(tmp_path / "in", KINDS[kind][0], {})
    (source / file).write_text(json.dumps(said))
    model_free_ptq(source, tmp_path / "out", "mxfp8")
    same(tensors_of(tmp_path / "out"), expected(meant, "mxfp8"))
    assert not (tmp_path / "out" / file).exists()


@pytest.mark.parametrize("where", ["text_config", "language_config", "thinker_config.text_config"])
def test_a_source_that_says_it_inside(where: str, tmp_path: Path) -> None:
    """A part of config.json declares it; the output's config.json does not, at any depth."""
    inner: dict[str, Any] = {"quantization_config": FP8, "hidden_size": 256}
    for key in reversed(where.split(".")):
        inner = {key: inner}
    source, _, meant = source_of(tmp_path / "in", held.blocks_of_fp8, {}, config={**DENSE, **inner})
    model_free_ptq(source, tmp_path / "out", "mxfp8")
    same(tensors_of(tmp_path / "out"), expected(meant, "mxfp8"))
    written = (tmp_path / "out" / "config.json").read_text()
    assert written.count("quantization_config") == 1
    assert "weight_block_size" not in written


def test_what_is_declared_and_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A fine-tune saved in bf16 with the config.json of its quantized origin is what its tensors are."""
    config = {**DENSE, "quantization_config": {"quant_method": "mxfp4"}, "compression_config": {"format": "dense"}}
    source = write_checkpoint(tmp_path / "in", dense_model(1), config=config)
    model_free_ptq(source, tmp_path / "out", "nvfp4a16")
    same(tensors_of(tmp_path / "out"), expected(dense_model(1), "nvfp4a16"))
    assert "no tensor is quantized" in caplog.text
    assert "mxfp4" not in (tmp_path / "out" / "config.json").read_text()


# Refused by name, before a byte is written


def refused(source: Path, *words: str, converter: Any = None, error: type[Exception] = UsageError) -> None:
    with pytest.raises(error) as caught:
        model_free_ptq(source, source.parent / "out", "mxfp8", converter=converter)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert not list(source.parent.glob("out*"))


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_tensors_that_do_not_say_enough(kind: str, tmp_path: Path) -> None:
    source, _, _ = source_of(tmp_path / "in", KINDS[kind][0], {})
    refused(source, "7 modules", "q_proj", "qweight", "converter=")


def test_a_name_stands_for_a_declaration(tmp_path: Path) -> None:
    """AWQ has one layout; GPTQ has two, and bits that cannot be seen."""
    source, _, meant = source_of(tmp_path / "in", held.awq, {})
    model_free_ptq(source, tmp_path / "named", "mxfp8", converter="awq")
    same(tensors_of(tmp_path / "named"), expected(meant, "mxfp8"))
    source, _, _ = source_of(tmp_path / "gptq" / "in", held.gptq, {})
    refused(source, "bits", "quantize_config.json", converter="gptq")


METHODS = ("bitsandbytes", "hqq", "aqlm", "torchao", "quark", "fbgemm_fp8", "auto-round", "bitnet")


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_are_not_read(method: str, tmp_path: Path) -> None:
    source, _, _ = source_of(tmp_path / "in", held.int8_of_modelopt, {"quant_method": method})
    refused(source, method, "config.json: quantization_config", "fp8_block")


def test_another_name_than_what_is_declared(tmp_path: Path) -> None:
    source, _, _ = source_of(tmp_path / "in", held.nvfp4, MODELOPT)
    refused(source, "modelopt", "leave it out, or give converter=modelopt", converter="fp8_block")
    refused(source, "unknown converter 'fp9'", "fp8_block", converter="fp9")
    plain = write_checkpoint(tmp_path / "plain" / "in", dense_model(1))
    refused(plain, "nothing to convert", converter="fp8_block")


@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json"])
@pytest.mark.parametrize(("key", "value"), [("rotation", {"type": "hadamard"}), ("scale_shift", 2), ("lora_rank", 32)])
def test_a_key_of_modelopt_s_that_is_not_known(where: str, key: str, value: Any, tmp_path: Path) -> None:
    config = {**MODELOPT, key: value}
    source, _, _ = source_of(tmp_path / "in", held.nvfp4, config if where == "config.json" else MODELOPT)
    if where != "config.json":
        (source / where).write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": config}))
    refused(source, "ModelOpt's config says", f"{key}=", "may change what tensors mean")


def test_a_key_of_modelopt_s_that_says_nothing(tmp_path: Path) -> None:
    said = {**MODELOPT, "rotation": None, "group_size": 16, "ignore": ["lm_head"]}
    source, _, meant = source_of(tmp_path / "in", held.nvfp4, said)
    model_free_ptq(source, tmp_path / "out", "mxfp8")
    same(tensors_of(tmp_path / "out"), expected(meant, "mxfp8"))


def test_a_source_that_contradicts_itself(tmp_path: Path) -> None:
    config = {**DENSE, "text_config": {"quantization_config": AWQ}}
    source, _, _ = source_of(tmp_path / "in", held.nvfp4, MODELOPT, config=config)
    refused(source, "contradicts itself", "text_config.quantization_config says awq", "modelopt")


BROKEN: dict[str, tuple[str, Callable[[dict[str, Tensor], str], Any], str]] = {
    "no scale": ("fp8 blocks", lambda t, m: t.pop(f"{m}.weight_scale_inv"), "weight [256, 256] float8_e4m3fn"),
    "another block": ("fp8 blocks", lambda t, m: t.update({f"{m}.weight_scale_inv": torch.ones(3, 2)}), "[3, 2]"),
    "a scale alone": ("fp8 blocks", lambda t, m: t.update({f"{m}.weight": torch.ones(256, 256).half()}), "scale_inv"),
    "no second scale": ("modelopt nvfp4", lambda t, m: t.pop(f"{m}.weight_scale_2"), "weight_scale"),
    "one tensor more": ("modelopt nvfp4", lambda t, m: t.update({f"{m}.svdquant_lora_a": torch.ones(4)}), "lora_a"),
    "no scales": ("awq", lambda t, m: t.pop(f"{m}.scales"), "qweight"),
    "zero points of another size": ("awq", lambda t, m: t.update({f"{m}.qzeros": torch.zeros(1, 2).int()}), "qzeros"),
    "groups that are not there": ("gptq", lambda t, m: t.update({f"{m}.g_idx": torch.full((256,), 99).int()}), "g_idx"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_damaged_modules(broken: str, tmp_path: Path) -> None:
    kind, harm, word = BROKEN[broken]
    hold, declared = KINDS[kind]
    source, stored, _ = source_of(tmp_path / "in", hold, declared)
    module = "model.layers.0.self_attn.q_proj"
    harm(stored, module)
    write_checkpoint(source, stored, config={**DENSE, "quantization_config": declared})
    refused(source, module, word)


def test_codes_of_no_format(tmp_path: Path) -> None:
    """bitsandbytes without a config, codes under an unknown name, codes of a layer's state."""
    weights = {
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(32768, 1, dtype=torch.uint8),
        "model.layers.0.self_attn.q_proj.weight.absmax": torch.zeros(1024),
    }
    refused(write_checkpoint(tmp_path / "bnb" / "in", {**dense_model(1), **weights}), "q_proj.weight", "absmax")
    other = {"model.layers.0.mlp.experts.gate_up_proj_q": torch.zeros(4, 8, 8).to(torch.float8_e4m3fn)}
    refused(write_checkpoint(tmp_path / "other" / "in", {**dense_model(1), **other}), "gate_up_proj_q")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_in_other_dtypes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = dense_model(1)
    tensors[name] = tensors[name].to(dtype)
    refused(write_checkpoint(tmp_path / "in", tensors), name, str(dtype).removeprefix("torch."))


def test_buffers_in_other_dtypes_pass(tmp_path: Path) -> None:
    """Position ids, masks in older files and routers' tables are copied."""
    buffers = {
        "model.embeddings.position_ids": torch.arange(8)[None],
        "model.layers.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "model.layers.0.mlp.gate.tid2eid": torch.zeros(64, 2, dtype=torch.int32),
    }
    source = write_checkpoint(tmp_path / "in", {**dense_model(1), **buffers})
    report = model_free_ptq(source, tmp_path / "out", "mxfp8", architecture="guess")
    found = tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in buffers.items())
    assert len(report.quantized) == 7
