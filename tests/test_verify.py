"""Each rule of `verify`: a good checkpoint, broken in just one way, and the rule that sees it."""

import importlib
import json
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LiveRanks
from safetensors.torch import save_file
from verifying import INDEX, Made, fused, make, saved_amax

from export.schemes import SCHEMES
from export.verify import RULES, Severity, VerifyReport, verify
from scripts import cli

LAYER = "model.layers.1"
Q, GATE, UP, DOWN = (
    f"{LAYER}.{each}" for each in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
)
EXPERT = f"{LAYER}.mlp.experts.3"
DENSE, MOE = "qwen3", "qwen3_moe"

type Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in this process: its exit status, standard output and standard error."""

    def run(name: str, *words: str) -> tuple[int, str, str]:
        module = importlib.import_module(f"scripts.{name}")
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        with pytest.raises(SystemExit) as stop:
            cli.run(name, getattr(module, name))
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def good(qwen3: Path, qwen3_moe: Path) -> Callable[..., Made]:
    """A good checkpoint by model and scheme, made once, a copy for each who asks."""
    made: dict[tuple[str, str, bool], Made] = {}

    def get(model: str, scheme: str = "nvfp4", *, cache: bool = False) -> Made:
        key = (model, scheme, cache)
        if key not in made:
            made[key] = make({DENSE: qwen3, MOE: qwen3_moe}[model], scheme, cache=cache)
        first = made[key]
        return Made(first.reference, dict(first.tensors), deepcopy(first.config))

    return get


@dataclass(frozen=True)
class Break:
    """One way to break a checkpoint.

    Args:
        rule: what must find it.
        subject: what must be named.
        change: of tensors and config.json, before they are written.
        damage: of the files, after they are written.
        reference: verify against what it was made from; `state`: against the amax it was made with.
    """

    rule: str
    subject: str
    change: Callable[[Made], object] = lambda made: None
    damage: Callable[[Path], object] = lambda directory: None
    model: str = DENSE
    scheme: str = "nvfp4"
    cache: bool = False
    reference: str = ""
    tp: int = 1


def drop(*names: str) -> Callable[[Made], object]:
    return lambda made: [made.tensors.pop(name) for name in names]


def drop_all(ending: str) -> Callable[[Made], object]:
    return lambda made: drop(*[name for name in made.tensors if name.endswith(ending)])(made)


def put(name: str, tensor: torch.Tensor) -> Callable[[Made], object]:
    return lambda made: made.tensors.update({name: tensor})


def scale(name: str, factor: float) -> Callable[[Made], object]:
    return lambda made: made.tensors.update({name: made.tensors[name] * factor})


def invert(*names: str) -> Callable[[Made], object]:
    return lambda made: made.tensors.update({name: 1 / made.tensors[name].float() for name in names})


def cast(name: str, dtype: torch.dtype) -> Callable[[Made], object]:
    return lambda made: made.tensors.update({name: made.tensors[name].view(dtype)})


def fill(name: str, value: float) -> Callable[[Made], object]:
    """A copy with one number in it."""

    def change(made: Made) -> None:
        changed = made.tensors[name].clone()
        changed.view(-1)[0] = value
        made.tensors[name] = changed

    return change


def configure(path: str, value: Any) -> Callable[[Made], object]:
    """Sets a key of `quantization_config`; dots go into dictionaries."""

    def change(made: Made) -> None:
        *parents, last = path.split(".")
        found: Any = made.quantization
        for key in parents:
            found = found[key]
        found[last] = value

    return change


def both(*changes: Callable[[Made], object]) -> Callable[[Made], object]:
    return lambda made: [change(made) for change in changes]


def targets(*names: str) -> Callable[[Made], object]:
    return configure("config_groups.group_0.targets", list(names))


def ignore(*entries: str) -> Callable[[Made], object]:
    return configure("ignore", list(entries))


def plain(module: str, *shape: int) -> Callable[[Made], object]:
    """Puts a weight in 16 bits in place of codes and scales."""

    def change(made: Made) -> None:
        drop(*[name for name in made.tensors if name.startswith(f"{module}.")])(made)
        made.tensors[f"{module}.weight"] = torch.ones(shape, dtype=torch.bfloat16)

    return change


def overlapping_groups(made: Made) -> None:
    first = made.group
    groups = {"group_0": {**first, "targets": [r"re:.*_proj$"]}, "group_1": {**first, "targets": [r"re:.*down_proj$"]}}
    made.quantization["config_groups"] = groups


def swap_nibbles(name: str) -> Callable[[Made], object]:
    return lambda made: made.tensors.update({name: (made.tensors[name] << 4) | (made.tensors[name] >> 4)})


def rename(before: str, after: str) -> Callable[[Made], object]:
    return lambda made: made.tensors.update({after: made.tensors.pop(before)})


def stack_experts(made: Made) -> None:
    names = [f"{LAYER}.mlp.experts.{expert}.gate_proj.weight_global_scale" for expert in range(8)]
    made.tensors[f"{LAYER}.mlp.experts.gate_up_proj_weight_global_scale"] = torch.cat(
        [made.tensors.pop(name) for name in names]
    )


def truncate(directory: Path) -> None:
    file = sorted(directory.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-8])


def overlap(directory: Path) -> None:
    """Two tensors at one place."""
    file = sorted(directory.glob("*.safetensors"))[1]
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    file.write_bytes(data[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + data[8 + length :])


def edit_index(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index)
        (directory / INDEX).write_text(json.dumps(index))

    return damage


def twice(directory: Path) -> None:
    save_file({"model.norm.weight": torch.ones(64)}, directory / "more.safetensors")


NAN, INF = float("nan"), float("inf")
BREAKS: dict[str, Break] = {
    # files
    "a truncated file": Break("headers", "model-00001-of-", damage=truncate),
    "overlapping tensors": Break("headers", "model-00002-of-", damage=overlap),
    "config.json is gone": Break("config", "config.json", damage=lambda path: (path / "config.json").unlink()),
    "no index": Break("index", INDEX, damage=lambda path: (path / INDEX).unlink()),
    "in the index only": Break(
        "index", "ghost", damage=edit_index(lambda index: index["weight_map"].update({"ghost": next(iter(index["weight_map"].values()))}))
    ),
    "in a header only": Break("index", f"{Q}.weight_packed", damage=edit_index(lambda index: index["weight_map"].pop(f"{Q}.weight_packed"))),
    "a file that is gone": Break(
        "index", "model-00002-of-", damage=lambda path: sorted(path.glob("*.safetensors"))[1].unlink()
    ),
    "a tensor in two files": Break("duplicates", "model.norm.weight", damage=twice),
    "a wrong total size": Break(
        "total-size", INDEX, damage=edit_index(lambda index: index["metadata"].update(total_size=1))
    ),
    # config.json
    "no quantization_config": Break(
        "quantization-config", "quantization_config", lambda made: made.config.pop("quantization_config")
    ),
    "another method": Break("quantization-config", "quant_method", configure("quant_method", "modelopt")),
    "an unknown key": Break("config-keys", "group_0.weights.zero", configure("config_groups.group_0.weights.zero", 0)),
    "a key of some versions": Break(
        "version-gate", "group_0.weights.zp_dtype", configure("config_groups.group_0.weights.zp_dtype", "torch.int8")
    ),
    "a group with a name of its own": Break(
        "group-names",
        "config_groups.mlp",
        lambda made: made.quantization.update(config_groups={"mlp": made.group}),
    ),
    "another format": Break("formats", "group_0.format", configure("config_groups.group_0.format", "pack-quantized")),
    "a global format of another": Break("formats", "format", configure("format", "float-quantized")),
    "an unknown scheme": Break("known-schemes", "config_groups.group_0", configure("config_groups.group_0.weights.num_bits", 3)),
    "class and name": Break("mixed-targets", "group_0: re:.*mlp", targets("Linear", "re:.*mlp")),
    "no regular expression": Break("patterns", "ignore: re:(", ignore("lm_head", "re:(")),
    # names, shapes, dtypes
    "a norm is missing": Break("expected-names", f"{LAYER}.self_attn.q_norm.weight", drop(f"{LAYER}.self_attn.q_norm.weight"), reference="weights"),
    "a tensor too many": Break("expected-names", "model.other.weight", put("model.other.weight", torch.ones(4)), reference="weights"),
    "another shape": Break("expected-names", "model.norm.weight", put("model.norm.weight", torch.ones(32)), reference="weights"),
    "a layer is missing": Break(
        "layers", LAYER, lambda made: drop(*[name for name in made.tensors if name.startswith(LAYER)])(made)
    ),
    "layers for prediction are missing": Break(
        "mtp", "num_nextn_predict_layers", lambda made: made.config.update(num_nextn_predict_layers=1)
    ),
    "an expert is missing": Break(
        "experts", EXPERT, lambda made: drop(*[name for name in made.tensors if name.startswith(EXPERT)])(made), model=MOE
    ),
    "the last expert of every layer is missing": Break(
        "experts",
        f"{LAYER}.mlp.experts.7",
        lambda made: drop(*[name for name in made.tensors if ".experts.7." in name])(made),
        model=MOE,
    ),
    "an expert's scale is missing": Break(
        "experts", f"{EXPERT}.up_proj.weight_scale", drop(f"{EXPERT}.up_proj.weight_scale"), model=MOE
    ),
    "experts' scales are stacked": Break(
        "stacked-experts", f"{LAYER}.mlp.experts.gate_up_proj_weight_global_scale", stack_experts, model=MOE
    ),
    "a scale of one shard is missing": Break("suffixes", f"{Q}.weight_global_scale", drop(f"{Q}.weight_global_scale")),
    "codes are missing": Break("suffixes", Q, drop(f"{Q}.weight_packed")),
    "all input scales are missing": Break("input-scales", f"{Q}.input_global_scale", drop_all("input_global_scale")),
    "input scales without activations": Break(
        "input-scales", f"{Q}.input_global_scale", put(f"{Q}.input_global_scale", torch.ones(1)), scheme="nvfp4a16"
    ),
    "scales as bytes": Break("contract", f"{Q}.weight_scale", cast(f"{Q}.weight_scale", torch.uint8)),
    "scales for padded columns": Break(
        "contract", f"{Q}.weight_scale", put(f"{Q}.weight_scale", torch.ones(128, 8).to(torch.float8_e4m3fn))
    ),
    "a scale without a dim": Break("contract", f"{Q}.weight_global_scale", put(f"{Q}.weight_global_scale", torch.tensor(9e3))),
    "a quantizer's buffer is left": Break(
        "leftovers", f"{Q}.weight_quantizer._amax", put(f"{Q}.weight_quantizer._amax", torch.ones(1))
    ),
    "another format's scale": Break("leftovers", f"{Q}.weight_scale_2", put(f"{Q}.weight_scale_2", torch.ones(1))),
    "a cache scale is missing": Break("kv-scales", f"{LAYER}.self_attn.v_scale", drop(f"{LAYER}.self_attn.v_scale"), cache=True),
    "cache scales without their scheme": Break(
        "kv-scales", f"{LAYER}.self_attn.k_scale", lambda made: made.quantization.pop("kv_cache_scheme"), cache=True
    ),
    # targets and ignore
    "a part of a fused layer is ignored": Break("unanimous", f"{LAYER}.mlp.gate_up_proj", ignore("lm_head", GATE)),
    "quantized and ignored": Break("quantized-is-targeted", DOWN, ignore("lm_head", r"re:.*down_proj$")),
    "a pattern without a dollar": Break("quantized-is-targeted", DOWN, ignore("lm_head", r"re:model\.layers\.1")),
    "contained in another name": Break(  # SGLang
        "unanimous", f"{LAYER}.mlp.gate_up_proj", ignore("lm_head", f"{LAYER}.mlp.gate")
    ),
    "targeted by no group": Break("quantized-is-targeted", DOWN, targets(r"re:.*self_attn\..*", r"re:.*(gate|up)_proj$")),
    "a head that is not ignored": Break("plain-is-ignored", "lm_head", ignore()),
    "a router that is not ignored": Break("plain-is-ignored", f"{LAYER}.mlp.gate", ignore("lm_head"), model=MOE),
    "a tied head that is not ignored": Break(
        "plain-is-ignored",
        "lm_head",
        both(ignore(), drop("lm_head.weight"), lambda made: made.config.update(tie_word_embeddings=True)),
    ),
    "a pattern that hits the fused name": Break(
        "plain-is-ignored", GATE, both(plain(GATE, 96, 64), targets(r"re:.*self_attn\..*", "re:.*up_proj$", "re:.*down_proj$"))
    ),
    "neither targeted nor ignored": Break(
        "targeted-or-ignored", f"{LAYER}.mlp.gate", both(ignore("lm_head"), targets(r"re:.*_proj$")), model=MOE
    ),
    "two groups for a module": Break("one-group", DOWN, overlapping_groups),
    "a pattern for routers that hits experts": Break(
        "router-patterns", "ignore: re:.*gate.*", ignore("lm_head", "re:.*gate.*"), model=MOE
    ),
    # fused groups
    "a group quantized in part": Break("fused-formats", GATE, plain(UP, 96, 64)),
    "one weight scale of q, k, v differs": Break(
        "fused-weight-scales", f"{Q}.weight_global_scale", scale(f"{LAYER}.self_attn.v_proj.weight_global_scale", 1 + 2**-22)
    ),
    "an expert's gate and up differ": Break(
        "fused-weight-scales", f"{EXPERT}.gate_proj.weight_global_scale", scale(f"{EXPERT}.up_proj.weight_global_scale", 2), model=MOE
    ),
    "static FP8 differs": Break("fused-weight-scales", f"{GATE}.weight_scale", scale(f"{UP}.weight_scale", 2), scheme="fp8"),
    "one input scale differs": Break(
        "fused-input-scales", f"{GATE}.input_global_scale", scale(f"{UP}.input_global_scale", 1 + 2**-22)
    ),
    # scales
    **{
        f"a global scale of {value}": Break("usable-weight-scales", f"{DOWN}.weight_global_scale", fill(f"{DOWN}.weight_global_scale", value))
        for value in (0.0, -1.0, NAN, INF)
    },
    "NaN in block scales": Break("usable-weight-scales", f"{DOWN}.weight_scale", fill(f"{DOWN}.weight_scale", NAN)),
    "zero in block scales": Break("usable-weight-scales", f"{DOWN}.weight_scale", fill(f"{DOWN}.weight_scale", 0.0)),
    "a negative block scale": Break("usable-weight-scales", f"{DOWN}.weight_scale", fill(f"{DOWN}.weight_scale", -1.0)),
    "NaN in E8M0": Break("usable-weight-scales", f"{DOWN}.weight_scale", fill(f"{DOWN}.weight_scale", 255), scheme="mxfp4"),
    "Inf in a row's scale": Break(
        "usable-weight-scales", f"{DOWN}.weight_scale", fill(f"{DOWN}.weight_scale", INF), scheme="fp8_dynamic"
    ),
    "an input scale of zero": Break("usable-input-scales", f"{DOWN}.input_global_scale", fill(f"{DOWN}.input_global_scale", 0.0)),
    "an uncalibrated expert": Break(
        "expert-input-scales", f"{EXPERT}.down_proj.input_global_scale", fill(f"{EXPERT}.down_proj.input_global_scale", INF), model=MOE
    ),
    "an expert's input is far off": Break(
        "far-experts", f"{EXPERT}.down_proj.input_global_scale", scale(f"{EXPERT}.down_proj.input_global_scale", 1e-4), model=MOE
    ),
    "a reciprocal global scale": Break("weight-divisors", f"{GATE}.weight_global_scale", invert(*fused(GATE, "weight_global_scale"))),
    "reciprocal scales of rows": Break("weight-divisors", f"{DOWN}.weight_scale", invert(f"{DOWN}.weight_scale"), scheme="w8a8"),
    "reciprocal input scales": Break(
        "input-divisors",
        f"{GATE}.input_global_scale",
        lambda made: invert(*[name for name in made.tensors if name.endswith("input_global_scale")])(made),
    ),
    "one reciprocal input scale": Break("input-divisors", f"{DOWN}.input_global_scale", invert(f"{DOWN}.input_global_scale")),
    "an amax far above the weights": Break(
        "unused-range", f"{DOWN}.weight_scale", put(f"{DOWN}.weight_scale", torch.full((64, 6), 0.5).to(torch.float8_e4m3fn))
    ),
    "a wrong weight_shape": Break("weight-shape", f"{DOWN}.weight_shape", put(f"{DOWN}.weight_shape", torch.tensor([64, 95])), scheme="w4a16"),
    # references
    "swapped nibbles": Break("weight-error", f"{DOWN}.weight", swap_nibbles(f"{DOWN}.weight_packed"), reference="weights"),
    "another layer's weights": Break(
        "weight-error",
        f"{DOWN}.weight",
        lambda made: made.tensors.update({f"{DOWN}.weight_packed": made.tensors["model.layers.0.mlp.down_proj.weight_packed"]}),
        reference="weights",
    ),
    "the error after the engine's merge": Break(
        "weight-error",
        f"{UP}.weight",
        both(scale(f"{UP}.weight_global_scale", 0.5), lambda made: made.tensors.update({f"{UP}.weight_scale": (made.tensors[f"{UP}.weight_scale"].float() / 2).to(torch.float8_e4m3fn)})),
        reference="weights",
    ),
    "an amax below the weights": Break("saturation", f"{DOWN}.weight", scale(f"{DOWN}.weight_global_scale", 4), reference="weights"),
    "another amax than training's": Break("amax", f"{DOWN}.input_global_scale", scale(f"{DOWN}.input_global_scale", 1.01), reference="state"),
    "heads that do not divide": Break("tensor-parallel", "num_attention_heads", tp=8),
}  # fmt: skip


def verified(broken: Break, made: Made, directory: Path) -> VerifyReport:
    broken.change(made)
    made.write(directory / "out")
    broken.damage(directory / "out")
    reference = None
    if broken.reference == "weights":
        reference = made.reference
    elif broken.reference == "state":
        reference = directory / "state.safetensors"
        save_file(dict(saved_amax(made)), reference)
    return verify(directory / "out", reference=reference, tp=broken.tp)


@pytest.mark.parametrize("way", BREAKS)
def test_each_break_is_found(way: str, good: Callable[..., Made], tmp_path: Path) -> None:
    broken = BREAKS[way]
    report = verified(broken, good(broken.model, broken.scheme, cache=broken.cache), tmp_path)
    found = {finding.rule: finding for finding in report.findings}
    assert broken.rule in found, sorted(found)
    finding = found[broken.rule]
    assert any(subject.startswith(broken.subject) for subject in finding.tensors), finding.tensors
    assert report.ok == (not report.failures)
    if finding.severity is Severity.ERROR:
        assert not report.ok
    assert finding.effect and finding.next_step
    json.dumps(report.as_json())


def test_every_rule_is_broken_once() -> None:
    assert {rule.name for rule in RULES} <= {broken.rule for broken in BREAKS.values()}
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("model", [DENSE, MOE])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_good_checkpoints_pass(scheme: str, model: str, good: Callable[..., Made], tmp_path: Path) -> None:
    """Nothing is found, with a reference either; but for the note on `scale_dtype` where the scheme has it."""
    made = good(model, scheme)
    report = verify(made.write(tmp_path / "out"), reference=made.reference)
    noted = "scale_dtype" in json.dumps(made.quantization)
    assert [finding.rule for finding in report.findings] == ["version-gate"] * noted
    assert report.ok
    assert report.modules == len(report.errors) == sum(each.modules for each in report.projections)
    assert all(each.mean_snr > 17 for each in report.projections)


def test_a_cache_and_amax_pass(good: Callable[..., Made], tmp_path: Path) -> None:
    made = good(DENSE, cache=True)
    save_file(dict(saved_amax(made)), tmp_path / "state.safetensors")
    report = verify(made.write(tmp_path / "out"), reference=tmp_path / "state.safetensors", tp=2)
    assert report.ok and not report.warnings


def test_plain_weights_pass(qwen3: Path) -> None:
    report = verify(qwen3, reference=qwen3)
    assert (report.findings, report.modules) == ((), 0)


def test_what_transformers_expects_is_expected(good: Callable[..., Made], tmp_path: Path) -> None:
    """Without a reference, names and shapes come from the model class; experts are packed there."""
    from bridge.hf_config import expected_tensors

    made = good(MOE)
    norm = f"{LAYER}.self_attn.k_norm.weight"
    expected = expected_tensors(made.reference)
    assert verify(made.write(tmp_path / "good"), expected=expected).ok
    del made.tensors[norm]
    [failure] = verify(made.write(tmp_path / "bad"), expected=expected).failures
    assert (failure.rule, failure.tensors) == ("expected-names", [norm])


def test_which_sizes_will_serve(good: Callable[..., Made], tmp_path: Path) -> None:
    """Two key-value heads are copied at TP=4; four heads do not divide by 8. 96 inputs of down_proj are 6 blocks."""
    report = verify(good(DENSE).write(tmp_path / "out"))
    serves = {each.size: each.serves for each in report.parallel if each.axis == "TP"}
    assert serves == {1: True, 2: True, 4: False, 8: False, 16: False}
    [reason] = [each.problems for each in report.parallel if (each.axis, each.size) == ("TP", 4)]
    assert [str(each) for each in reason] == [
        "model.layers.0.mlp.down_proj: a shard has 24 inputs, which do not divide by 16"
    ]
    moe = verify(good(MOE).write(tmp_path / "moe"))
    assert {each.size for each in moe.parallel if each.axis == "EP" and each.serves} == {1, 2, 4, 8}


def test_the_reason_of_an_error_is_said(good: Callable[..., Made], tmp_path: Path) -> None:
    made = good(DENSE)
    swap_nibbles(f"{DOWN}.weight_packed")(made)
    scale(f"{LAYER}.self_attn.o_proj.weight_global_scale", 2)(made)
    report = verify(made.write(tmp_path / "out"), reference=made.reference)
    [finding] = [finding for finding in report.failures if finding.rule == "weight-error"]
    said = {problem.subject: problem.what for problem in finding.problems}
    assert "nibbles are in the wrong order" in said[f"{DOWN}.weight"]
    assert "nearest at 1.99" in said[f"{LAYER}.self_attn.o_proj.weight"]


def test_a_state_beside_the_weights_is_no_part_of_them(good: Callable[..., Made], tmp_path: Path) -> None:
    made = good(DENSE)
    made.write(tmp_path / "out")
    save_file(dict(saved_amax(made)), tmp_path / "out" / "quant_state.safetensors")
    assert verify(tmp_path / "out").ok


class TestCommandLine:
    """`scripts/verify.py`: tables, JSON, exit status."""

    def test_a_good_one(self, good: Callable[..., Made], tmp_path: Path, command: Command) -> None:
        made = good(MOE)
        made.write(tmp_path / "out")
        words = (f"input={tmp_path / 'out'}", f"reference={made.reference}", f"json={tmp_path / 'found.json'}")
        status, printed, _ = command("verify", *words)
        assert status == 0
        assert "fit to serve" in printed and "experts.*.gate_proj" in printed and "TP=2" in printed
        found = json.loads((tmp_path / "found.json").read_text())
        assert found["ok"] and found["schemes"] == {"nvfp4": 56}

    def test_a_bad_one(self, good: Callable[..., Made], tmp_path: Path, command: Command) -> None:
        made = good(DENSE)
        drop(f"{Q}.weight_global_scale", "model.norm.weight")(made)
        made.write(tmp_path / "out")
        status, printed, message = command("verify", f"input={tmp_path / 'out'}", f"json={tmp_path / 'found.json'}")
        assert status == 1
        assert "2 rules are broken" in message
        assert "suffixes" in printed and "as memory was" in " ".join(printed.replace("│", " ").split())
        rules = {each["rule"] for each in json.loads((tmp_path / "found.json").read_text())["findings"]}
        assert {"suffixes", "expected-names"} <= rules, "names come from transformers' model"

    def test_no_such_directory(self, tmp_path: Path, command: Command) -> None:
        status, _, message = command("verify", f"input={tmp_path / 'none'}")
        assert status == 2
        assert "does not exist" in message


def test_an_export_that_would_not_serve_is_not_written(
    live: LiveRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """The model is said to have one more tensor than the Megatron checkpoint."""
    monkeypatch.setattr("bridge.save.expected_tensors", lambda directory: {"model.more.weight": (4,)})
    words = (f"checkpoint={live.at(tp=2) / 'checkpoint'}", f"hf={live.hf}", f"output={tmp_path / 'out'}")
    status, _, message = command("export", *words)
    assert status == 1
    assert "would not serve right, and was not written:\nexpected-names" in message
    assert "model.more.weight: is not there" in message
    assert list(tmp_path.iterdir()) == []
    status, _, message = command("export", *words, "verify=false")
    assert (status, message) == (0, "")
    assert (tmp_path / "out" / "config.json").is_file()
