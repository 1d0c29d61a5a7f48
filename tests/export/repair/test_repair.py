"""`repair`: good checkpoints broken in one way, mended; what cannot be mended, refused; what is right, untouched."""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amaxbridge.export.repair import RepairReport, repair
from amaxbridge.export.repair.all_mends import MENDS
from amaxbridge.export.schemes import SCHEMES
from amaxbridge.export.verify import RULES, verify
from amaxbridge.export.verify.mendable import MENDABLE
from amaxbridge.mappings.errors import CheckpointError, OutputExistsError, UsageError
from tests.export.runtime.test_runtime_load import logits
from tests.support.checkpoints import tensors_of
from tests.support.checkpoints_to_verify import INDEX, Made, make
from tests.support.repair_breaks import NOT_OURS, OTHERWISE, OWN, REFUSED, SAME, WAYS
from tests.support.verify_breaks import BREAKS, DENSE, EXPERT_INPUT, MOE, UP, Q, fill, scale


@pytest.fixture(scope="session")
def good(qwen3: Path, qwen3_moe: Path) -> Callable[..., Made]:
    """Makes the good checkpoint of a model and scheme once, and gives each caller a copy."""
    made: dict[tuple[str, str, bool], Made] = {}

    def get(model: str = DENSE, scheme: str = "nvfp4", *, cache: bool = False) -> Made:
        key = (model, scheme, cache)
        if key not in made:
            made[key] = make({DENSE: qwen3, MOE: qwen3_moe}[model], scheme, cache=cache)
        first = made[key]
        return Made(first.reference, dict(first.tensors), deepcopy(first.config))

    return get


def broken(way: str, good: Callable[..., Made], directory: Path) -> Made:
    """Writes the good checkpoint, and the broken one; returns the good one."""
    found = WAYS[way]
    made = good(found.model, found.scheme, cache=found.cache)
    made.write(directory / "good")
    right = Made(made.reference, dict(made.tensors), deepcopy(made.config))
    found.change(made)
    made.write(directory / "bad")
    found.damage(directory / "bad")
    return right


def same(found: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return found.keys() == right.keys() and all(
        found[name].dtype == right[name].dtype
        and found[name].shape == right[name].shape
        and found[name].reshape(-1).view(torch.uint8).equal(right[name].reshape(-1).view(torch.uint8))
        for name in right
    )


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def rules_of(directory: Path) -> list[str]:
    return [finding.rule for finding in verify(directory).findings]


def rules_mended_by(report: RepairReport) -> set[str]:
    mends = {each.mend for each in report.changes}
    return {rule for mend in MENDS if mend.name in mends for rule in mend.rules}


class TestTable:
    def test_every_break_is_accounted_for(self) -> None:
        ways = [*SAME, *OTHERWISE, *REFUSED, *NOT_OURS]
        assert sorted(ways) == sorted(WAYS) and len(set(ways)) == len(ways)
        assert len(SAME) + len(OTHERWISE) >= 60

    def test_verify_knows_what_can_be_mended(self) -> None:
        assert {rule for mend in MENDS for rule in mend.rules} == MENDABLE.keys()
        assert MENDABLE.keys() <= {rule.name for rule in RULES}
        assert len({mend.name for mend in MENDS}) == len(MENDS)

    def test_every_mend_is_tried(self) -> None:
        """Each test of a way asserts that a mend for its rule did it."""
        mended = {WAYS[way].rule for way in (*SAME, *OTHERWISE)}
        untried = {mend.name for mend in MENDS if mended.isdisjoint(mend.rules)}
        assert untried == {"lost-weight-scales", "zero-block-scales"}, "which have tests of their own"


@pytest.mark.parametrize("way", SAME)
def test_the_good_checkpoint_is_back(way: str, good: Callable[..., Made], tmp_path: Path) -> None:
    right = broken(way, good, tmp_path)
    assert WAYS[way].rule in rules_of(tmp_path / "bad")
    report = repair(tmp_path / "bad", tmp_path / "out")
    assert report.written and report.ok and WAYS[way].rule in rules_mended_by(report)
    assert [finding.rule for finding in report.left] == rules_of(tmp_path / "out") == rules_of(tmp_path / "good")
    assert same(tensors_of(tmp_path / "out"), right.tensors)
    assert not repair(tmp_path / "out", tmp_path / "again").changes, "mended once, nothing is left to mend"


@pytest.mark.parametrize(
    "way",
    [
        "no index",
        "another method",
        "quantized and ignored",
        "two groups for a module",
        "scales as bytes",
        "a reciprocal",
    ],
)
def test_transformers_computes_what_was_meant(way: str, good: Callable[..., Made], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    broken(way, good, tmp_path)
    repair(tmp_path / "bad", tmp_path / "out")
    meant, found = (
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")) for name in ("good", "out")
    )
    assert meant.isfinite().all() and meant.std() > 0.01 and torch.equal(found, meant)


@pytest.mark.parametrize("way", OTHERWISE)
def test_it_serves_again(way: str, good: Callable[..., Made], tmp_path: Path) -> None:
    broken(way, good, tmp_path)
    assert WAYS[way].rule in rules_of(tmp_path / "bad") or WAYS[way].reference
    report = repair(tmp_path / "bad", tmp_path / "out", unseen="layer_max")
    assert report.written and report.ok and (WAYS[way].rule in rules_mended_by(report) or WAYS[way].reference)
    assert [finding.rule for finding in report.left] == rules_of(tmp_path / "out") == rules_of(tmp_path / "good")
    assert not repair(tmp_path / "out", tmp_path / "again").changes


@pytest.mark.parametrize("way", REFUSED)
def test_what_cannot_be_known_is_refused(way: str, good: Callable[..., Made], tmp_path: Path) -> None:
    found = WAYS[way]
    broken(way, good, tmp_path)
    with pytest.raises(CheckpointError, match="cannot be made to serve by a repair") as refused:
        repair(tmp_path / "bad", tmp_path / "out", unseen="layer_max")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    report = repair(tmp_path / "bad", tmp_path / "out", unseen="layer_max", dry_run=True)
    assert not report.ok and not report.written
    left = report.after.failures[0]
    assert f"{left.rule}: {left.problems[0]}" in str(refused.value)
    assert found.rule in {finding.rule for finding in report.left} | rules_mended_by(report)


@pytest.mark.parametrize("way", NOT_OURS)
def test_the_rest_stays(way: str, good: Callable[..., Made], tmp_path: Path) -> None:
    broken(way, good, tmp_path)
    report = repair(tmp_path / "bad", tmp_path / "out", dry_run=True)
    assert report.ok and {each.mend for each in report.changes} <= {"targets-and-ignore"}


@pytest.mark.parametrize("model", [DENSE, MOE])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_right_is_changed(scheme: str, model: str, good: Callable[..., Made], tmp_path: Path) -> None:
    good(model, scheme).write(tmp_path / "good")
    before = files_of(tmp_path / "good")
    report = repair(tmp_path / "good", tmp_path / "out", unseen="layer_max", dry_run=scheme == "fp8_block")
    assert not (report.changes or report.refusals or report.written or (tmp_path / "out").exists())
    if report.ok:
        assert repair(tmp_path / "good", tmp_path / "out", copy=True).written
        assert files_of(tmp_path / "out") == before == files_of(tmp_path / "good")


@pytest.mark.parametrize(
    ("model", "scheme"), [(DENSE, "nvfp4"), (MOE, "nvfp4a16"), (DENSE, "w4a16"), (MOE, "fp8_dynamic")]
)
def test_what_other_programs_write_is_right(model: str, scheme: str, good: Callable[..., Made], tmp_path: Path) -> None:
    """llm-compressor's config: keys that say nothing to an engine, patterns in `ignore`, names that nothing has."""
    made = good(model, scheme)
    group, quantization = made.group, made.quantization
    for part in ("weights", "input_activations"):
        if group[part] is not None:
            group[part] |= {"observer": "static_minmax", "observer_kwargs": {}, "actorder": None}
            group[part] |= {"zp_dtype": "torch.float8_e4m3fn", "scale_dtype": "torch.float8_e4m3fn"}
    quantization["ignore"] = ["lm_head", r"re:.*\.mlp\.gate$", "re:vision_tower.*", "model.layers.99.mlp.gate"]
    quantization |= {"version": "0.20.0", "global_compression_ratio": None, "kv_cache_scheme": None}
    quantization |= {"sparsity_config": {}, "transform_config": {}, "moe_sparsity_config": None}
    made.write(tmp_path / "good")
    report = repair(tmp_path / "good", tmp_path / "out")
    assert not (report.changes or report.refusals or report.written) and report.ok, report.changes


class TestFiles:
    def test_only_what_changes_is_written_anew(self, good: Callable[..., Made], tmp_path: Path) -> None:
        made = good()
        scale(f"{UP}.input_global_scale", 2)(made)
        made.write(tmp_path / "bad")
        for name in ("recipe.yaml", "README.md", "chat_template.jinja", "extra/notes.txt", "quant_state.safetensors"):
            (tmp_path / "bad" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "bad" / name).write_bytes(name.encode())
        before = files_of(tmp_path / "bad")
        report = repair(tmp_path / "bad", tmp_path / "out")
        after = files_of(tmp_path / "out")
        [changed] = report.files
        assert {name for name in after if after[name] != before.get(name)} == {changed, "amaxbridge.json"}
        assert before.keys() <= after.keys() and files_of(tmp_path / "bad") == before
        assert len(before[changed]) == len(after[changed])
        record = json.loads(after["amaxbridge.json"])
        [noted] = record["repairs"]
        assert len(noted["changes"]) == 1 and f"one-input-scale: {UP}.input_global_scale" in noted["changes"][0]

    def test_a_header_that_others_wrote_stays(self, good: Callable[..., Made], tmp_path: Path) -> None:
        """The order of names, the metadata and the padding are the writer's; our own writer would choose others."""
        from safetensors.torch import save_file

        made = good()
        made.config["quantization_config"]["ignore"] = []
        made.write(tmp_path / "bad")
        for file in (tmp_path / "bad").glob("*.safetensors"):
            save_file(tensors_in_file(file), file, metadata={"by": "somebody", "format": "pt"})
        report = repair(tmp_path / "bad", tmp_path / "out")
        assert report.files == ("config.json",)
        before, after = files_of(tmp_path / "bad"), files_of(tmp_path / "out")
        assert {name for name in before if before[name] != after[name]} == {"config.json"}

    def test_a_dry_run_shows_everything_and_writes_nothing(self, good: Callable[..., Made], tmp_path: Path) -> None:
        broken("several things at once", good, tmp_path)
        before = files_of(tmp_path)
        report = repair(tmp_path / "bad", tmp_path / "out", dry_run=True)
        assert files_of(tmp_path) == before and not report.written and report.ok
        written = repair(tmp_path / "bad", tmp_path / "out")
        assert written.changes == report.changes and written.files == report.files
        assert {each.mend for each in report.changes} == {
            "formats", "leftovers", "targets-and-ignore", "lost-input-scales", "one-input-scale", "index",
        }  # fmt: skip
        json.dumps(report.as_json())

    def test_an_output_that_exists(self, good: Callable[..., Made], tmp_path: Path) -> None:
        broken("a head", good, tmp_path)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("")
        with pytest.raises(OutputExistsError, match="exists and is not empty"):
            repair(tmp_path / "bad", tmp_path / "out")
        assert repair(tmp_path / "bad", tmp_path / "out", overwrite=True).written
        for place in (tmp_path / "bad", tmp_path / "bad" / "inside", tmp_path):
            with pytest.raises(UsageError, match="must not lie in one another"):
                repair(tmp_path / "bad", place)

    def test_what_verify_would_refuse_can_be_had(self, good: Callable[..., Made], tmp_path: Path) -> None:
        """verify=false: the index is mended, the truncated expert is not."""
        made = good(MOE)
        del made.tensors[f"{EXPERT_INPUT.removesuffix('input_global_scale')}weight_scale"]
        made.config["quantization_config"]["ignore"].remove("lm_head")
        made.write(tmp_path / "bad")
        with pytest.raises(CheckpointError, match="1 other things can be mended"):
            repair(tmp_path / "bad", tmp_path / "out")
        report = repair(tmp_path / "bad", tmp_path / "out", verify=False)
        assert report.written and not report.ok
        assert "lm_head" in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]


def tensors_in_file(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    return dict(load(file.read_bytes()))


class TestNames:
    def test_deepseeks_name_of_block_scales(self, good: Callable[..., Made], tmp_path: Path) -> None:
        """The tiny model is too narrow for the engines' kernels, so nothing is written; the plan is right."""
        made = good(DENSE, "fp8_block")
        renamed = {name.replace(".weight_scale", ".weight_scale_inv"): tensor for name, tensor in made.tensors.items()}
        Made(made.reference, renamed, made.config).write(tmp_path / "bad")
        report = repair(tmp_path / "bad", tmp_path / "out", dry_run=True)
        assert [each.mend for each in report.changes].count("names") == 14
        assert not {"leftovers", "suffixes", "contract"} & {finding.rule for finding in report.left}


class TestZeros:
    """A block of zeros whose scale is zero."""

    @pytest.mark.parametrize("zero", [0x00, 0x80])
    def test_it_becomes_one(self, zero: int, good: Callable[..., Made], tmp_path: Path) -> None:
        made = good(DENSE, "nvfp4a16")
        codes, scales = f"{UP}.weight_packed", f"{UP}.weight_scale"
        made.tensors |= {name: made.tensors[name].clone() for name in (codes, scales)}
        made.tensors[codes][3, :8] = 0x80
        made.tensors[scales].view(torch.uint8)[3, 0] = zero
        made.tensors[f"{UP}.weight_global_scale"] = made.tensors[f"{UP}.weight_global_scale"] * 1.5  # and not shared
        made.write(tmp_path / "bad")
        assert "usable-weight-scales" in rules_of(tmp_path / "bad") or zero
        report = repair(tmp_path / "bad", tmp_path / "out")
        after = tensors_of(tmp_path / "out")
        assert report.ok and after[codes].equal(made.tensors[codes]) and after[scales].float().min() > 0
        assert {each.mend for each in report.changes} >= {"zero-block-scales", "one-weight-scale"} or zero


class TestInputScales:
    def test_experts_without_tokens_need_a_word(self, good: Callable[..., Made], tmp_path: Path) -> None:
        made = good(MOE)
        fill(EXPERT_INPUT, float("inf"))(made)
        made.write(tmp_path / "bad")
        with pytest.raises(CheckpointError, match=r"unseen=layer_max gives it"):
            repair(tmp_path / "bad", tmp_path / "out")
        with pytest.raises(UsageError, match="unknown unseen=guess: use error, layer_max"):
            repair(tmp_path / "bad", tmp_path / "out", unseen="guess")
        report = repair(tmp_path / "bad", tmp_path / "out", unseen="layer_max")
        down = [name for name in made.tensors if name.endswith("down_proj.input_global_scale") and "layers.1" in name]
        others = [float(made.tensors[name]) for name in down if name != EXPERT_INPUT]
        assert float(tensors_of(tmp_path / "out")[EXPERT_INPUT]) == min(others), "the largest amax, the least divisor"
        assert len(report.changes) == 1 and len(others) == 7

    @pytest.mark.parametrize(
        ("scheme", "tensor", "wins"), [("nvfp4", "input_global_scale", min), ("fp8", "input_scale", max)]
    )
    def test_the_largest_amax_wins(
        self, scheme: str, tensor: str, wins: Callable[..., float], good: Callable[..., Made], tmp_path: Path
    ) -> None:
        made = good(DENSE, scheme)
        names = [f"{Q.removesuffix('q_proj')}{each}_proj.{tensor}" for each in "qkv"]
        values = [torch.tensor([value]) for value in (0.5, 0.125, 0.25)]
        made.tensors |= dict(zip(names, values, strict=True))
        made.write(tmp_path / "bad")
        repair(tmp_path / "bad", tmp_path / "out")
        after = tensors_of(tmp_path / "out")
        assert [float(after[name]) for name in names] == [wins(map(float, values))] * 3


class TestCommandLine:
    def test_it_repairs(self, good: Callable[..., Made], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
        broken("several things at once", good, tmp_path)
        words = [f"input={tmp_path / 'bad'}", f"output={tmp_path / 'out'}", f"json={tmp_path / 'found.json'}"]
        assert command(monkeypatch, *words, "dry_run=true") == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "would be written anew" in printed and "one-input-scale" in printed and "fit to serve" in printed
        assert command(monkeypatch, *words) == 0 and (tmp_path / "out" / INDEX).is_file()
        assert json.loads((tmp_path / "found.json").read_text())["written"] is True
        assert command(monkeypatch, f"input={tmp_path / 'out'}", f"output={tmp_path / 'more'}") == 0
        assert "nothing to repair" in capsys.readouterr().out and not (tmp_path / "more").exists()

    def test_it_refuses(self, good: Callable[..., Made], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
        broken("an expert is gone", good, tmp_path)
        words = [f"input={tmp_path / 'bad'}", f"output={tmp_path / 'out'}"]
        assert command(monkeypatch, *words) == 1 and command(monkeypatch, *words, "dry_run=true") == 1
        assert "would not serve right even with all changes" in capsys.readouterr().err
        assert command(monkeypatch, f"input={tmp_path / 'none'}", f"output={tmp_path / 'out'}") == 2

    def test_verify_names_it(self, good: Callable[..., Made], tmp_path: Path) -> None:
        broken("a head", good, tmp_path)
        [finding] = verify(tmp_path / "bad").as_json()["findings"][-1:]
        assert finding["rule"] in MENDABLE and finding["repair"] == MENDABLE[finding["rule"]]


def command(monkeypatch: Any, *words: str) -> int:
    """Exit status of `amaxbridge repair`, in this process."""
    import sys

    from amaxbridge import cli
    from amaxbridge.scripts.repair import repair as run

    monkeypatch.setattr(sys, "argv", ["repair", *words])
    with pytest.raises(SystemExit) as stop:
        cli.run("repair", run)
    return int(stop.value.code or 0)


def test_the_table_of_ways_is_not_empty() -> None:
    assert len(OWN) >= 18 and len(BREAKS) > 100 and RepairReport.__doc__
