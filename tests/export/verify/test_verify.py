"""Each rule of `verify`: a good checkpoint, broken in just one way, and the rule that sees it."""

import importlib
import json
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from amaxbridge import cli
from amaxbridge.bridge.hf import expected_tensors
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.export.schemes import SCHEMES, Groups, named_scheme
from amaxbridge.export.schemes.w4a16 import w4a16
from amaxbridge.export.schemes.w8a16 import w8a16
from amaxbridge.export.verify import RULES, Severity, VerifyReport, verify
from amaxbridge.export.verify.checkpoint_view import CheckpointView
from amaxbridge.export.verify.parallel_sizes import parallel_sizes
from amaxbridge.export.verify.verify_report import NAMES
from amaxbridge.mappings.errors import UsageError
from tests.support.checkpoints_to_verify import Made, make, saved_amax
from tests.support.launcher import LiveRanks
from tests.support.tiny_models import TINY_MODELS
from tests.support.verify_breaks import BREAKS, DENSE, DOWN, LAYER, MOE, Break, Q, drop, scale, swap_nibbles
from tests.sweep.architectures import PUBLISHED, rows
from tests.sweep.random_models import build, save

type Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in this process: its exit status, standard output and standard error."""

    def run(name: str, *words: str, columns: int = 160) -> tuple[int, str, str]:
        module = importlib.import_module(f"amaxbridge.scripts.{name}")
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as stop:
            cli.run(name, getattr(module, name))
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def good(qwen3: Path, qwen3_moe: Path) -> Callable[..., Made]:
    """Makes the good checkpoint of a model and scheme once, and gives each caller a copy."""
    made: dict[tuple[str, str, bool], Made] = {}

    def get(model: str, scheme: str = "nvfp4", *, cache: bool = False) -> Made:
        key = (model, scheme, cache)
        if key not in made:
            made[key] = make({DENSE: qwen3, MOE: qwen3_moe}[model], scheme, cache=cache)
        first = made[key]
        return Made(first.reference, dict(first.tensors), deepcopy(first.config))

    return get


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
    return verify(directory / "out", reference=reference, tp=broken.tp, ep=broken.ep)


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
        engines = [broken.engine] if broken.engine else sorted({each.engine for each in finding.problems})
        assert not any(report.verdict_of(engine).serves for engine in engines if engine) and (
            "" not in engines or not report.ok
        )
        assert not broken.engine or finding.rule in {each.rule for each in report.verdict_of(broken.engine).failures}
    assert finding.effect and finding.next_step
    json.dumps(report.as_json())


def test_every_rule_is_broken_once() -> None:
    assert {rule.name for rule in RULES} <= {broken.rule for broken in BREAKS.values()}
    assert {broken.engine for broken in BREAKS.values() if broken.engine} == set(NAMES)
    assert len({rule.name for rule in RULES}) == len(RULES)


UNSERVED: dict[tuple[str, str], tuple[str, ...]] = {
    ("mxfp4", DENSE): ("sglang",),
    ("mxfp4a16", DENSE): ("sglang",),
    ("mxfp8", DENSE): ("sglang",),
    ("mxfp8a16", DENSE): ("sglang",),
    ("fp8_block", DENSE): ("vllm", "sglang", "transformers"),
    ("w4a16_asym", DENSE): ("transformers",),
    ("w4afp8", DENSE): ("vllm", "sglang"),
    ("nvfp4", MOE): ("transformers",),
    ("nvfp4a16", MOE): ("transformers",),
    ("mxfp4", MOE): ("sglang",),
    ("mxfp4a16", MOE): ("sglang",),
    ("mxfp8", MOE): ("sglang", "transformers"),
    ("mxfp8a16", MOE): ("sglang", "transformers"),
    ("fp8_block", MOE): ("vllm", "sglang", "transformers"),
    ("w4a16_asym", MOE): ("transformers",),
    ("w8a8", MOE): ("sglang", "transformers"),
    ("w4afp8", MOE): ("vllm", "sglang"),
}
"""The engines that do not serve a good checkpoint; the tiny models are too narrow for blocks of 128."""


@pytest.mark.parametrize("model", [DENSE, MOE])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_good_checkpoints_pass(scheme: str, model: str, good: Callable[..., Made], tmp_path: Path) -> None:
    """Nothing is found, with a reference either; but for the note on `scale_dtype` where the scheme has it, that
    the tiny models are too narrow for the kernels of packed integers, and what single engines do not serve."""
    made = good(model, scheme)
    report = verify(made.write(tmp_path / "out"), reference=made.reference)
    noted = "scale_dtype" in json.dumps(made.quantization)
    narrow = bool(SCHEMES[scheme].kernel_tiles)
    of_all = [finding.rule for finding in report.findings if finding.of_all]
    assert of_all == ["version-gate"] * noted + ["marlin-tiles"] * narrow
    unserved = UNSERVED.get((scheme, model), ())
    assert {each.engine for each in report.verdicts if not each.serves} == set(unserved)
    assert report.ok == (len(unserved) < 3) and verify(tmp_path / "out", engine="runtime").ok
    assert report.modules == len(report.errors) == sum(each.modules for each in report.projections)
    assert all(each.mean_snr > 17 for each in report.projections)


def test_a_cache_and_amax_pass(good: Callable[..., Made], tmp_path: Path) -> None:
    made = good(DENSE, cache=True)
    save_file(dict(saved_amax(made)), tmp_path / "state.safetensors")
    report = verify(made.write(tmp_path / "out"), reference=tmp_path / "state.safetensors", tp=2)
    assert report.ok and not report.warnings


def test_divisors_with_headroom_pass(good: Callable[..., Made], tmp_path: Path) -> None:
    """ModelOpt's `nvfp4_act_headroom` calibrates every input amax to 16384 times a small input."""
    made = good(DENSE)
    divisors = [name for name in made.tensors if name.endswith(".input_global_scale")]
    assert len(divisors) == 14
    for name in divisors:
        made.tensors[name] = torch.tensor([2688 / 20_000])
    assert verify(made.write(tmp_path / "out")).ok


def test_plain_weights_pass(qwen3: Path) -> None:
    report = verify(qwen3, reference=qwen3)
    assert (report.findings, report.modules) == ((), 0)


def test_what_transformers_expects_is_expected(good: Callable[..., Made], tmp_path: Path) -> None:
    """Without a reference, names and shapes come from the model class; experts are packed there."""
    from amaxbridge.bridge.hf import expected_tensors

    made = good(MOE)
    norm = f"{LAYER}.self_attn.k_norm.weight"
    expected = expected_tensors(made.reference)
    assert verify(made.write(tmp_path / "good"), expected=expected).ok
    del made.tensors[norm]
    [failure] = verify(made.write(tmp_path / "bad"), expected=expected).failures
    assert (failure.rule, failure.tensors) == ("expected-names", [norm])


@pytest.mark.parametrize("family", ["DeepSeek-V3", "Mixtral", "GPT-OSS", "Gemma 2", "Nemotron-H"])
def test_other_families_pass(family: str, tmp_path: Path) -> None:
    """Families with latent attention, w1/w3 names, packed or transposed experts with biases, a tied head, Mamba."""
    import torch
    from transformers import AutoModelForCausalLM

    from amaxbridge.bridge.hf import expected_tensors

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TINY_MODELS[family].make(), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    model_free_ptq(tmp_path / "hf", tmp_path / "out", "nvfp4a16")
    for known in ({"expected": expected_tensors(tmp_path / "hf")}, {"reference": tmp_path / "hf"}):
        report = verify(tmp_path / "out", **known)  # type: ignore[arg-type]
        assert not any(finding.of_all for finding in report.findings)
        assert report.ok == report.verdict_of("vllm").serves == (family != "GPT-OSS"), report.verdict_of(
            "vllm"
        ).failures
    assert report.modules == len(report.errors) > 0


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


LAYERS = {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576)}
MLP = {"gate_proj": (1536, 576), "up_proj": (1536, 576), "down_proj": (576, 1536)}


def quantized_shapes(
    directory: Path, shapes: dict[str, tuple[int, int]], scheme: Any, architecture: str = "LlamaForCausalLM"
) -> VerifyReport:
    """`verify` of random weights `[out, in]` in a layer of nine heads and three key-value heads."""
    (directory / "hf").mkdir()
    generator = torch.Generator().manual_seed(0)
    names = {name: f"model.layers.0.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}.weight" for name in shapes}
    tensors = {names[name]: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, directory / "hf" / "model.safetensors")
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3}
    (directory / "hf" / "config.json").write_text(json.dumps({"architectures": [architecture], **sizes}))
    (directory / "hf" / "tokenizer.json").write_text("{}")
    model_free_ptq(directory / "hf", directory / "out", scheme)
    return verify(directory / "out", tp=1)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16_asym"])
@pytest.mark.parametrize(
    ("size", "serves", "reason"),
    [
        (64, {1: True, 3: True, 9: False}, "down_proj: 1536 inputs do not divide by 9"),
        (32, {1: True, 3: True, 9: False}, "down_proj: 1536 inputs do not divide by 9"),
    ],
)
def test_which_sizes_groups_of_columns_will_serve(
    scheme: str, size: int, serves: dict[int, bool], reason: str, tmp_path: Path
) -> None:
    """The shapes of SmolLM2-135M: a rank of three has 192 inputs of o_proj, of nine 64."""
    report = quantized_shapes(tmp_path, LAYERS | MLP, Groups.of(named_scheme(scheme, size)))
    with CheckpointView(tmp_path / "out") as view:
        found = {each.size: each for each in parallel_sizes(view, tuple(serves))}
    assert {number: each.serves for number, each in found.items()} == serves
    assert any(str(problem).endswith(reason) for problem in found[9].problems)
    [tiles] = [finding for finding in report.findings if finding.rule == "marlin-tiles"]
    assert [str(problem).partition(": ")[2] for problem in tiles.problems] == [
        "q_proj + k_proj + v_proj is [960, 576]", "o_proj is [576, 576]"
    ]  # fmt: skip
    assert report.ok


@pytest.mark.parametrize(
    ("size", "shape", "problem"),
    [
        (128, (64, 128), ""),
        (64, (64, 192), "down_proj is [64, 192]"),
        (64, (128, 192), ""),
        (32, (96, 128), "down_proj is [96, 128]"),
        (32, (128, 96), "down_proj is [128, 96]"),
    ],
)
def test_tiles(size: int, shape: tuple[int, int], problem: str, tmp_path: Path) -> None:
    report = quantized_shapes(tmp_path, {"down_proj": shape}, Groups.of(named_scheme("w4a16", size)))
    found = [str(each) for finding in report.findings if finding.rule == "marlin-tiles" for each in finding.problems]
    assert found == [f"model.layers.0.mlp.down_proj: {problem}"] * bool(problem)


def test_groups_that_no_kernel_has(tmp_path: Path) -> None:
    report = quantized_shapes(tmp_path, {"down_proj": (64, 96)}, Groups.of(w4a16(48)))
    [problem] = report.parallel[0].problems
    assert str(problem).endswith("48 inputs share a scale, and engines have kernels for groups of 32, 64, 128")


def test_groups_are_not_cut(tmp_path: Path) -> None:
    report = quantized_shapes(tmp_path, {"down_proj": (64, 384)}, Groups.of(named_scheme("w4a16", 128)))
    with CheckpointView(tmp_path / "out") as view:
        one, three, four = (each.problems for each in parallel_sizes(view, (1, 3, 2)))
    assert not one and report.ok
    assert not [each for each in three if "down_proj" in str(each)]
    assert "a shard has 192 inputs, which do not divide by 128" in str(four[-1])


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16_asym"])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group", "wrong"),
    [
        (128, 256, 128, {1}),  # at TP=2 and above, down_proj's group is cut
        (256, 256, 128, {2}),
        (512, 256, 128, {4}),
        (256, 256, 64, {4}),
        (256, 128, 128, {1}),  # the other way round: one group of gate, two of down
        (128, 128, 128, set()),
    ],
)
def test_experts_with_one_group_in_a_row(
    scheme: str, outputs: int, inputs: int, group: int, wrong: set[int], tmp_path: Path
) -> None:
    """vLLM lays out scales of gate by its outputs. So a rank with one group of them is wrong, in vLLM alone."""
    shapes = {f"experts.0.{name}_proj": (outputs, inputs) for name in ("gate", "up")}
    shapes["experts.0.down_proj"] = (inputs, outputs)
    report = quantized_shapes(tmp_path, shapes, Groups.of(named_scheme(scheme, group)), "Qwen3MoeForCausalLM")
    with CheckpointView(tmp_path / "out") as view:
        found = {each.size: each.problems for each in parallel_sizes(view, (1, 2, 4)) if each.axis == "TP"}
    named = {size: [each for each in problems if "other rows' scales" in each.what] for size, problems in found.items()}
    assert {size for size, problems in named.items() if problems} == wrong
    assert {each.engine for problems in named.values() for each in problems} == ({"vllm"} if wrong else set())
    assert report.verdict_of("vllm").serves == (1 not in wrong)
    assert report.verdict_of("sglang").serves


@pytest.mark.parametrize(("make_scheme", "columns"), [(w4a16, 100), (w4a16, 97), (w8a16, 66), (w4a16, 128)])
def test_whole_rows_may_end_within_a_word(make_scheme: Any, columns: int, tmp_path: Path) -> None:
    """Eight or four codes a word: the codes alone say 104 columns where there are 100."""
    report = quantized_shapes(tmp_path, {"down_proj": (64, columns)}, Groups.of(make_scheme(-1)))
    assert {finding.rule for finding in report.findings} <= {"marlin-tiles"}, report.findings
    assert verify(tmp_path / "out", reference=tmp_path / "hf").errors[0].error < 0.2


@pytest.mark.parametrize("stated", [[64, 105], [64, 96], [63, 100], [0, 100], [64, -4]])
def test_a_shape_that_the_codes_do_not_hold_is_found(stated: list[int], tmp_path: Path) -> None:
    quantized_shapes(tmp_path, {"down_proj": (64, 100)}, Groups.of(w4a16(-1)))
    [file] = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight_shape"] = torch.tensor(stated)
    save_file(tensors, file)
    assert "weight-shape" in {finding.rule for finding in verify(tmp_path / "out").failures}


def test_a_table_and_a_verdict_agree(tmp_path: Path) -> None:
    """FP8 blocks of 128 at 576 inputs: no size serves in vLLM and SGLang, and the verdict says so."""
    report = quantized_shapes(tmp_path, LAYERS | MLP, "fp8_block")
    assert not any(each.serves for each in report.parallel if each.axis == "TP")
    assert {each.engine: each.serves for each in report.verdicts} == {
        "vllm": False, "sglang": False, "transformers": False, "runtime": True
    }  # fmt: skip
    for engine, fits in (("vllm", False), ("transformers", False), ("runtime", True), ("all", False)):
        assert verify(tmp_path / "out", engine=engine).ok is fits
    with pytest.raises(UsageError, match=r"Unknown engine 'tgi'\. Use vllm, sglang, transformers, runtime or all"):
        verify(tmp_path / "out", engine="tgi")


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
        assert "rule expected-names: model.norm.weight: is not there" in message and "Broken rules: 2" in message
        assert "suffixes" in printed and "as memory was" in " ".join(printed.replace("│", " ").split())
        rules = {each["rule"] for each in json.loads((tmp_path / "found.json").read_text())["findings"]}
        assert {"suffixes", "expected-names"} <= rules, "names come from transformers' model"

    def test_an_engine_that_does_not_serve_it(
        self, good: Callable[..., Made], tmp_path: Path, command: Command
    ) -> None:
        good(MOE, "nvfp4a16").write(tmp_path / "out")
        words = (f"input={tmp_path / 'out'}", f"json={tmp_path / 'found.json'}")
        status, printed, _ = command("verify", *words)
        assert status == 0 and "fit to serve in vLLM 0.33.0, SGLang 0.5.23" in " ".join(printed.split())
        found = json.loads((tmp_path / "found.json").read_text())["engines"]
        assert {engine: each["serves"] for engine, each in found.items()} == {
            "vllm": True, "sglang": True, "transformers": False, "runtime": True
        }  # fmt: skip
        assert found["transformers"]["rules"] == ["engine-schemes"]
        status, _, message = command("verify", *words, "engine=transformers")
        assert status == 1 and "would not serve right in transformers, rule engine-schemes" in message

    def test_tables_fit_80_columns(self, good: Callable[..., Made], tmp_path: Path, command: Command) -> None:
        made = good(MOE)
        drop(f"{LAYER}.self_attn.q_proj.weight_global_scale")(made)
        made.write(tmp_path / "out")
        _, printed, _ = command("verify", f"input={tmp_path / 'out'}", f"reference={made.reference}", columns=80)
        lines = printed.splitlines()
        assert max(map(len, lines)) <= 80
        assert len(lines) > 30 and not any(line.rstrip(" │").endswith("…") for line in lines if "more" not in line)

    def test_no_such_directory(self, tmp_path: Path, command: Command) -> None:
        status, _, message = command("verify", f"input={tmp_path / 'none'}")
        assert status == 2
        assert "does not exist" in message


def test_an_export_that_would_not_serve_is_not_written(
    live: LiveRanks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """The model is said to have one more tensor than the Megatron checkpoint."""
    monkeypatch.setattr("amaxbridge.bridge.save.Saver._expected", lambda *_: {"model.more.weight": (4,)})
    words = (f"checkpoint={live.at(tp=2) / 'checkpoint'}", f"hf={live.hf}", f"output={tmp_path / 'out'}")
    status, _, message = command("export", *words)
    assert status == 1
    assert "would not serve right, and was not written:\nexpected-names" in message
    assert "model.more.weight: is not there" in message
    assert list(tmp_path.iterdir()) == []
    status, _, message = command("export", *words, "verify=false")
    assert (status, message) == (0, "")
    assert (tmp_path / "out" / "config.json").is_file()


class TestPackedReference:
    """The table says which axis of a reference's experts is which, and what they are called there."""

    @pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "granitemoe"])
    def test_other_layouts_than_most(self, tmp_path: Path, model_type: str) -> None:
        (row,) = rows([model_type])
        save(build(row.model_type, row.architecture), tmp_path / "hf", PUBLISHED)
        model_free_ptq(tmp_path / "hf", tmp_path / "out", "fp8_dynamic")
        report = verify(tmp_path / "out", reference=tmp_path / "hf", expected=expected_tensors(tmp_path / "out"))
        assert len([each for each in report.errors if ".experts." in each.module]) >= 12
        assert all(each.error < 0.04 for each in report.errors)
        assert {name: report.verdict_of(name).serves for name in NAMES} == {
            "vllm": model_type != "granitemoe", "sglang": True, "transformers": False, "runtime": True,
        }  # fmt: skip
