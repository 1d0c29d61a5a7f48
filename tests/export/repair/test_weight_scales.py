"""Unequal global scales: what compressed-tensors, our runtime and `verify` read after the repair, and before."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from amaxbridge.export.disk.shard_writer import ShardWriter
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.export.repair import RepairReport, repair
from amaxbridge.export.runtime import load_model_
from amaxbridge.export.verify import verify
from amaxbridge.mappings.errors import CheckpointError, WriteError
from amaxbridge.mappings.fused_groups import groups_among
from tests.export.runtime.test_runtime_load import empty_model, error, logits
from tests.support.checkpoints import tensors_in, tensors_of
from tests.support.checkpoints_to_verify import Made, fused, make
from tests.support.paths import ROOT
from tests.support.repair_breaks import share_nothing
from tests.support.tiny_models import TINY_MODELS
from tests.support.verify_breaks import LAYER, both, drop, fill
from tests.sweep.file_oracle import decompress, quantization_of

UNEQUAL = {"k_proj": 0.3, "v_proj": 0.11, "up_proj": 0.17}
"""What the weights of a projection are multiplied by."""
EIGHT_EXPERTS = torch.logspace(0, -1, 8).tolist()
"""Of each expert's up_proj: amax of gate and up differ by up to ten times."""


def scaled_model(source: Path, target: Path, factor: Callable[[str], float]) -> Path:
    """A model with the weights of some modules multiplied."""
    shutil.copytree(source, target)
    tensors = {name: tensor * factor(name) for name, tensor in tensors_in(source).items()}
    for file in target.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, target / "model.safetensors")
    (target / "tokenizer.json").write_text("{}")
    return target


def of_expert(name: str) -> float:
    *_, expert, projection, _ = ("", "", *name.split("."))
    return EIGHT_EXPERTS[int(expert)] if projection == "up_proj" and expert.isdigit() else 1.0


def of_projection(name: str) -> float:
    return UNEQUAL.get(name.split(".")[-2], 1.0) if "." in name else 1.0


@pytest.fixture(scope="module")
def dense(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_of(qwen3, tmp_path_factory.mktemp("dense"), of_projection)


@pytest.fixture(scope="module")
def experts(qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_of(qwen3_moe, tmp_path_factory.mktemp("experts"), of_expert)


def three_of(source: Path, root: Path, factor: Callable[[str], float]) -> Path:
    """A directory with `hf`, `shared` (quantized as it should be) and `bad`, each member with a scale of its own."""
    scaled_model(source, root / "hf", factor)
    model_free_ptq(root / "hf", root / "shared", "nvfp4a16")
    made = make(root / "hf", "nvfp4a16")
    share_nothing(made)
    made.write(root / "bad")
    return root


def weights(directory: Path) -> dict[str, Tensor]:
    """Every quantized weight, in fp32, by compressed-tensors' own function."""
    tensors, quantization = tensors_of(directory), quantization_of(directory)
    modules = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    parts = ("weight_packed", "weight_scale", "weight_global_scale")
    return {
        module: decompress(module, {part: tensors[f"{module}.{part}"] for part in parts}, quantization).float()
        for module in modules
    }


def errors(directory: Path, reference: Path) -> dict[str, float]:
    """Of each weight, after an engine's merge of scales."""
    return {each.module: each.error for each in verify(directory, reference=reference).errors}


@pytest.mark.parametrize(("name", "modules"), [("dense", 14), ("experts", 56)])
def test_weights_are_back(name: str, modules: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    root: Path = request.getfixturevalue(name)
    report = repair(root / "bad", tmp_path / "out")
    served, mended, right = (errors(each, root / "hf") for each in (root / "bad", tmp_path / "out", root / "shared"))
    assert len(served) == len(mended) == len(right) == modules
    assert max(served.values()) > 0.8, "an engine reads weights as little as a tenth of what they are"
    assert max(right.values()) < 0.12
    assert all(mended[module] < 1.1 * right[module] for module in right), "the rounding of a block scale more"
    assert mended_as_reported(report, root / "bad", tmp_path / "out") > modules / 4


def mended_as_reported(report: RepairReport, bad: Path, out: Path) -> int:
    """Holds the reported changes against the weights as compressed-tensors decompresses them; returns how many."""
    before, after = tensors_of(bad), tensors_of(out)
    theirs_before, theirs_after = weights(bad), weights(out)
    told = {each.subject.removesuffix(".weight_global_scale"): each.moved for each in report.changes}
    for module, weight in theirs_before.items():
        assert torch.equal(before[f"{module}.weight_packed"], after[f"{module}.weight_packed"]), "codes stay"
        levels = after[f"{module}.weight_scale"].float()
        assert levels.min() > 0 and levels.max() <= 448
        change = theirs_after[module] - weight
        rms = float(change.norm() / weight.norm())
        moved = told.get(module)
        if moved is None:
            assert rms == 0
            continue
        assert rms == pytest.approx(moved.rms, abs=4e-3), "decompressed weights are in bf16"
        largest = float((change.abs() / weight.abs().clamp(min=1e-30))[weight != 0].max())
        assert largest == pytest.approx(moved.largest, abs=1.2e-2)
        assert moved.rms < 0.04 and moved.largest < 0.13
    groups = {tuple(fused(module, "weight_global_scale")) for module in theirs_before}
    assert all(len({float(after[name]) for name in group if name in after}) == 1 for group in groups)
    return len(told)


def test_logits_are_back(dense: Path, tmp_path: Path) -> None:
    """transformers reads every member under its own scale: what it computes from the broken one is what was meant."""
    from transformers import AutoModelForCausalLM

    repair(dense / "bad", tmp_path / "out")
    meant, found = (logits(AutoModelForCausalLM.from_pretrained(each)) for each in (dense / "bad", tmp_path / "out"))
    plain = logits(AutoModelForCausalLM.from_pretrained(dense / "hf"))
    ours = empty_model(tmp_path / "out", torch.bfloat16)
    load_model_(ours, tmp_path / "out")
    assert torch.equal(logits(ours), found)
    noise = error(meant, plain)
    assert noise > 0.02 and error(found, plain) < 1.15 * noise, (noise, error(found, plain))
    assert error(found, meant) < 0.5 * noise


def test_a_static_fp8_group_is_mended_as_vllm_merges_it(qwen3: Path, tmp_path: Path) -> None:
    """Codes move to the largest scale, each to the nearest; weights keep three binary digits."""
    made = make(qwen3, "fp8")
    names = fused(f"{LAYER}.self_attn.q_proj", "weight_scale")
    before = {name: made.tensors[name.removesuffix("_scale")].float() * made.tensors[name] for name in names}
    for name, factor in zip(names, (1.0, 0.3, 0.05), strict=True):
        made.tensors[name] = made.tensors[name] * factor
        before[name] = before[name] * factor
    made.write(tmp_path / "bad")
    report = repair(tmp_path / "bad", tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert len({float(after[name]) for name in names}) == 1 and verify(tmp_path / "out").ok
    assert {each.mend for each in report.changes} == {"one-weight-scale"}
    for name in names:
        weight = after[name.removesuffix("_scale")].float() * after[name]
        assert error(weight, before[name]) < 0.04


FAMILIES = {
    "Mixtral": ".experts.7.w1",
    "DeepSeek-V3": ".self_attn.q_a_proj",
    "Qwen1.5-MoE": ".shared_expert.gate_proj",
    "GLM-4.5": ".self_attn.q_proj",
}
"""Family → the first member of a group that it must have."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_fused_group(family: str, tmp_path: Path) -> None:
    """w1/w3, MLA's q_a and kv_a, shared experts: the last member of every group gets a scale of its own."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TINY_MODELS[family].make(), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    model_free_ptq(tmp_path / "hf", tmp_path / "bad", "nvfp4a16")
    tensors = tensors_of(tmp_path / "bad")
    modules = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    groups = [group for group in groups_among(modules) if len(group.members) > 1]
    for number, group in enumerate(groups):
        tensors[f"{group.members[-1]}.weight_global_scale"] *= 1.5 + number % 9
    [file] = (tmp_path / "bad").glob("*.safetensors")
    save_file(tensors, file, metadata={"format": "pt"})
    before = weights(tmp_path / "bad")
    report = repair(tmp_path / "bad", tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert any(group.primary.endswith(FAMILIES[family]) for group in groups) and report.ok
    for group in groups:
        assert len({float(after[f"{member}.weight_global_scale"]) for member in group.members}) == 1
    assert all(error(weight, before[module]) < 0.04 for module, weight in weights(tmp_path / "out").items())


class TestModelOptsFormat:
    """The same checkpoint under ModelOpt's names: multipliers without a dim, and two configs."""

    @pytest.fixture
    def made(self, dense: Path, tmp_path: Path) -> Path:
        model_free_ptq(dense / "hf", tmp_path / "good", "nvfp4a16", format="modelopt")
        return tmp_path / "good"

    def test_nothing_right_is_changed(self, made: Path, tmp_path: Path) -> None:
        report = repair(made, tmp_path / "out")
        assert not (report.changes or report.refusals or report.written)

    def test_one_scale_for_a_group(self, made: Path, tmp_path: Path) -> None:
        tensors = tensors_of(made)
        name = f"{LAYER}.mlp.up_proj.weight_scale_2"
        assert tensors[name].shape == ()
        tensors[name] = tensors[name] / 4
        before = tensors[name.replace("_scale_2", "_scale")].float() * tensors[name]
        [file] = made.glob("*.safetensors")
        save_file(tensors, file, metadata={"format": "pt"})
        [change] = repair(made, tmp_path / "out").changes
        after = tensors_of(tmp_path / "out")
        assert change.subject == name and after[name] == tensors[name.replace("up_proj", "gate_proj")]
        assert error(after[name.replace("_scale_2", "_scale")].float() * after[name], before) < 0.01
        assert verify(tmp_path / "out").ok


class TestLost:
    """A member's scale that is gone, and what the others tell."""

    @pytest.fixture
    def sharing(self, dense: Path) -> Made:
        """The members differ by factors, so one of them fills the range of the scale that they share."""
        return make(dense / "hf", "nvfp4a16")

    @pytest.mark.parametrize("value", [None, 0.0, -1.0, float("nan"), float("inf")])
    @pytest.mark.parametrize("member", ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "mlp.up_proj"])
    def test_the_partners_tell(self, member: str, value: float | None, sharing: Made, tmp_path: Path) -> None:
        name = f"{LAYER}.{member}.weight_global_scale"
        right = sharing.tensors[name]
        (drop(name) if value is None else fill(name, value))(sharing)
        sharing.write(tmp_path / "bad")
        report = repair(tmp_path / "bad", tmp_path / "out")
        assert torch.equal(tensors_of(tmp_path / "out")[name], right)
        assert {each.mend for each in report.changes} <= {"lost-weight-scales", "index"}

    def test_all_of_a_group(self, sharing: Made, tmp_path: Path) -> None:
        drop(*fused(f"{LAYER}.self_attn.q_proj", "weight_global_scale"))(sharing)
        sharing.write(tmp_path / "bad")
        with pytest.raises(CheckpointError, match="no other tensor says the scale of this weight"):
            repair(tmp_path / "bad", tmp_path / "out")

    def test_where_scales_are_not_shared(self, dense: Path, tmp_path: Path) -> None:
        made = make(dense / "hf", "nvfp4a16")
        both(share_nothing, drop(f"{LAYER}.self_attn.k_proj.weight_global_scale"))(made)
        made.write(tmp_path / "bad")
        with pytest.raises(CheckpointError, match="fused groups of this checkpoint have scales of their own"):
            repair(tmp_path / "bad", tmp_path / "out")


class TestInterrupted:
    @pytest.fixture
    def expected(self, experts: Path, tmp_path: Path) -> dict[str, bytes]:
        repair(experts / "bad", tmp_path / "undisturbed")
        return {path.name: path.read_bytes() for path in (tmp_path / "undisturbed").iterdir()}

    def test_it_goes_on(
        self, experts: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The disk is full in the middle: finished files stay, and the next run only writes the others."""
        write, calls = os.pwrite, iter(range(10**6))
        monkeypatch.setattr(os, "pwrite", lambda *args: _full() if next(calls) > 60 else write(*args))
        with pytest.raises(WriteError, match="No space left on device"):
            repair(experts / "bad", tmp_path / "out")
        monkeypatch.undo()
        assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
        assert 0 < repair(experts / "bad", tmp_path / "out").resumed < len(expected)
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected

    def test_another_source_is_made_anew(self, experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A tensor file was written anew since: what the interrupted run made of it does not count."""
        shutil.copytree(experts / "bad", tmp_path / "bad")
        write, calls = os.pwrite, iter(range(10**6))
        monkeypatch.setattr(os, "pwrite", lambda *args: _full() if next(calls) > 60 else write(*args))
        with pytest.raises(WriteError, match="No space left on device"):
            repair(tmp_path / "bad", tmp_path / "out")
        monkeypatch.undo()
        file = tmp_path / "bad" / "model-00001-of-00007.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert repair(tmp_path / "bad", tmp_path / "out").resumed == 0
        assert (tmp_path / "out" / file.name).read_bytes()[-1] == data[-1]

    def test_killed(self, experts: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
        """SIGKILL after some writes: nothing is at the output, and the next run ends with the same bytes."""
        code = (
            "import os, signal, sys\n"
            "from amaxbridge import repair\n"
            "write, left = os.pwrite, iter(range(int(sys.argv[3])))\n"
            "os.pwrite = lambda *args: write(*args) if next(left, None) is not None else os.kill(os.getpid(), 9)\n"
            "repair(sys.argv[1], sys.argv[2])\n"
        )
        words = [sys.executable, "-c", code, str(experts / "bad"), str(tmp_path / "out")]
        for writes in ("3", "150"):
            assert subprocess.run([*words, writes], check=False, cwd=ROOT).returncode == -signal.SIGKILL
            assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
        repair(experts / "bad", tmp_path / "out")
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected

    @pytest.mark.parametrize("name", ["config.json", "model-00002-of-00007.safetensors", "tokenizer.json"])
    def test_a_source_that_changes(
        self, name: str, experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree(experts / "bad", tmp_path / "bad")
        done, file = ShardWriter.done, tmp_path / "bad" / name

        def touch(writer: ShardWriter, bundle: str) -> None:
            done(writer, bundle)
            file.write_bytes(file.read_bytes())

        monkeypatch.setattr(ShardWriter, "done", touch)
        with pytest.raises(CheckpointError, match="changed while they were read"):
            repair(tmp_path / "bad", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def _full() -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_all_pairs_are_mended(experts: Path, tmp_path: Path) -> None:
    """The report names each expert: how far its scales were apart, and what one scale costs."""
    report = repair(experts / "bad", tmp_path / "out", dry_run=True)
    ups = [each for each in moved_experts(report) if each[0].endswith("up_proj")]
    assert len({name for name, _ in moved_experts(report)}) >= 14 and len(ups) >= 14
    assert all(rms < 0.04 for _, rms in ups)


def moved_experts(report: RepairReport) -> Iterator[tuple[str, float]]:
    for each in report.changes:
        if ".experts." in each.subject and each.moved is not None:
            yield each.subject.removesuffix(".weight_global_scale"), each.moved.rms
