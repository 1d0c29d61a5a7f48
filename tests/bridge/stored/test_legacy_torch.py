"""Legacy checkpoints, saved by real ranks as Megatron-LM does: the bytes of the live export, and clear refusals."""

import io
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.bridge.stored.identification import identify, stored_model
from amaxbridge.bridge.stored.open_checkpoint import open_checkpoint
from amaxbridge.mappings.errors import CheckpointError
from tests.support.comparing import same_files, same_tensors
from tests.support.launcher import Launcher, LiveRanks
from tests.support.live_checkpoints import SCHEMES, convert
from tests.support.stored_checkpoints import megatron_state, write_state


@pytest.mark.parametrize("form", SCHEMES)
def test_saved_at_tp_2_pp_2(dense: LiveRanks, tmp_path: Path, form: str) -> None:
    saved = dense.at(tp=2, pp=2)
    convert(dense, saved / f"legacy_{form}", tmp_path / "out", SCHEMES[form])
    same_files(tmp_path / "out", saved / f"live_{form}")


@pytest.mark.parametrize("form", ["plain", "nvfp4"])
def test_saved_at_ep_2(moe: LiveRanks, tmp_path: Path, form: str) -> None:
    saved = moe.at(processes=2, tp=1, ep=2)
    convert(moe, saved / f"legacy_{form}", tmp_path / "out", SCHEMES[form])
    same_files(tmp_path / "out", saved / f"live_{form}")


@pytest.mark.parametrize("form", SCHEMES)
def test_saved_at_etp_2(moe: LiveRanks, tmp_path: Path, form: str) -> None:
    saved = moe.at(tp=2, pp=1)
    convert(moe, saved / f"legacy_{form}", tmp_path / "out", SCHEMES[form])
    same_files(tmp_path / "out", saved / f"live_{form}")


MESHES = {
    "vpp": ("qwen3_moe_mixed", {"processes": 2, "pp": 2, "vpp": 2}),
    "tp, ep and etp": ("qwen3_moe_mixed", {"processes": 2, "tp": 2, "ep": 2, "etp": 1}),
    "latent attention": ("deepseek_v3", {"processes": 2, "tp": 2}),
    "mamba": ("nemotron_h", {"processes": 4, "tp": 2, "pp": 2}),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_other_meshes(
    launch: Launcher, request: pytest.FixtureRequest, shared: Path, tmp_path: Path, mesh: str
) -> None:
    """Chunks of a virtual pipeline count layers each from 0. At ETP below TP, a file has shards, but whole experts."""
    name, sizes = MESHES[mesh]
    live = LiveRanks(launch, "live_legacy.py", request.getfixturevalue(name), shared / f"legacy_{name}")
    saved = live.at(**sizes)
    convert(live, saved / "legacy_plain", tmp_path / "out", "none")
    same_files(tmp_path / "out", saved / "live_plain")


def test_without_hf(dense: LiveRanks, moe: LiveRanks, tmp_path: Path) -> None:
    """The saved arguments describe the model, its vocabulary is that of all ranks."""
    for number, (live, saved) in enumerate([(dense, dense.at(tp=2, pp=2)), (moe, moe.at(processes=2, tp=1, ep=2))]):
        bridge = AutoBridge.from_megatron_checkpoint(saved / "legacy_plain", vocab_size=131)
        assert bridge.hf.family.architectures == AutoBridge.from_hf_pretrained(live.hf).hf.family.architectures
        bridge.convert_checkpoint(saved / "legacy_plain", tmp_path / str(number), scheme="none")
        same_tensors(tmp_path / str(number), saved / "live_plain")
        assert bridge.hf.family.architectures[0] in identify(saved / "legacy_plain")
    padded = AutoBridge.from_megatron_checkpoint(dense.at(tp=2, pp=2) / "legacy_plain")
    assert padded.hf.config["vocab_size"] in (131, 132)


def test_the_quantizers_of_torch_dist(dense: LiveRanks, moe: LiveRanks) -> None:
    seen = 0
    for live, saved in ((dense, dense.at(tp=2, pp=2)), (moe, moe.at(processes=2, tp=1, ep=2))):
        hf = read_hf_model(live.hf)
        legacy, expected = (
            {each.name: each.attributes for each in stored_model(open_checkpoint(saved / form), hf).all_quantizers()}
            for form in ("legacy_nvfp4", "nvfp4")
        )
        assert legacy.keys() == expected.keys()
        for name, attributes in expected.items():
            assert legacy[name].keys() == attributes.keys()
            assert legacy[name]["_disabled"] == attributes["_disabled"]
            seen += 1
    assert seen > 100


class TestRefused:
    """One clear error, before anything is written; and nothing of a pickle runs."""

    @pytest.fixture
    def saved(self, dense: LiveRanks, tmp_path: Path) -> Path:
        shutil.copytree(dense.at(tp=2, pp=2) / "legacy_nvfp4", tmp_path / "saved")
        return tmp_path / "saved" / "iter_0000007"

    def refuse(self, dense: LiveRanks, saved: Path) -> str:
        with pytest.raises(CheckpointError) as error:
            convert(dense, saved.parent, saved.parent.parent / "out", "nvfp4")
        assert not list(saved.parent.parent.glob("out*"))
        return str(error.value)

    def change(self, file: Path, changing: Callable[[dict[str, Any]], object]) -> None:
        state = torch.load(file, weights_only=False)
        changing(state)
        torch.save(state, file)

    def test_a_rank_is_missing(self, dense: LiveRanks, saved: Path) -> None:
        shutil.rmtree(saved / "mp_rank_01_000")
        message = self.refuse(dense, saved)
        assert "TP=2, PP=2, EP=1, ETP=2" in message
        assert "embedding.word_embeddings.weight: 1 of 2 shards" in message

    def test_a_stage_is_missing(self, dense: LiveRanks, saved: Path) -> None:
        for directory in saved.glob("mp_rank_*_001"):
            shutil.rmtree(directory)
        assert "files of 1 of 2 PP ranks" in self.refuse(dense, saved)

    def test_a_file_of_another_training(self, dense: LiveRanks, saved: Path) -> None:
        shutil.copytree(saved / "mp_rank_01_000", saved / "mp_rank_02_000")
        assert "mp_rank_02_000/model_optim_rng.pt is of no rank of TP=2, PP=2, EP=1" in self.refuse(dense, saved)

    def test_two_files_of_one_rank(self, dense: LiveRanks, saved: Path) -> None:
        shutil.copytree(saved / "mp_rank_01_000", saved / "mp_rank_001_000")
        assert "has several files of the same ranks:\n  mp_rank_001_000/" in self.refuse(dense, saved)

    def test_sizes_that_no_training_has(self, dense: LiveRanks, saved: Path) -> None:
        self.change(
            saved / "mp_rank_00_000/model_optim_rng.pt",
            lambda state: setattr(state["args"], "tensor_model_parallel_size", 1 << 60),
        )
        assert f"files of 2 of {1 << 60} TP ranks" in self.refuse(dense, saved)

    def test_no_arguments(self, dense: LiveRanks, saved: Path) -> None:
        self.change(saved / "mp_rank_00_000/model_optim_rng.pt", lambda state: state.pop("args"))
        assert "has no saved arguments: nothing says if its files are of pipeline" in self.refuse(dense, saved)

    def test_no_model(self, dense: LiveRanks, saved: Path) -> None:
        self.change(saved / "mp_rank_00_000/model_optim_rng.pt", lambda state: state.pop("model"))
        assert "has no model" in self.refuse(dense, saved)

    @pytest.mark.parametrize("version", [0, 1.0, "3"])
    def test_an_old_version(self, dense: LiveRanks, saved: Path, version: object) -> None:
        self.change(
            saved / "mp_rank_00_000/model_optim_rng.pt", lambda state: state.update({"checkpoint_version": version})
        )
        assert f"checkpoint_version {version}" in self.refuse(dense, saved)

    def test_more_etp_than_tp(self, dense: LiveRanks, saved: Path) -> None:
        self.change(
            saved / "mp_rank_00_000/model_optim_rng.pt",
            lambda state: setattr(state["args"], "expert_tensor_parallel_size", 4),
        )
        assert "TP=2 and ETP=4, where ranks with different shards of experts wrote one file" in self.refuse(
            dense, saved
        )

    def test_a_truncated_file(self, dense: LiveRanks, saved: Path) -> None:
        file = saved / "mp_rank_01_001/model_optim_rng.pt"
        os.truncate(file, file.stat().st_size // 2)
        assert "cannot be read as a file of torch.save" in self.refuse(dense, saved)

    def test_a_file_from_before_zip_archives(self, dense: LiveRanks, saved: Path) -> None:
        file = saved / "mp_rank_01_001/model_optim_rng.pt"
        state = torch.load(file, weights_only=False)
        torch.save(state, file, _use_new_zipfile_serialization=False)
        assert "If PyTorch before 1.6 wrote it" in self.refuse(dense, saved)

    def test_something_that_is_no_tensor(self, dense: LiveRanks, saved: Path) -> None:
        self.change(
            saved / "mp_rank_00_000/model_optim_rng.pt",
            lambda state: state["model"].update({"decoder.layers.0.mlp.linear_fc1.weight": [1, 2]}),
        )
        assert "decoder.layers.0.mlp.linear_fc1.weight is no tensor" in self.refuse(dense, saved)

    def test_shards_of_different_shapes(self, dense: LiveRanks, saved: Path) -> None:
        self.change(
            saved / "mp_rank_01_000/model_optim_rng.pt",
            lambda state: state["model"].update({"decoder.layers.0.mlp.linear_fc1.weight": torch.ones(6, 64)}),
        )
        assert "decoder.layers.0.mlp.linear_fc1.weight" in self.refuse(dense, saved)

    def test_code(self, dense: LiveRanks, saved: Path, tmp_path: Path) -> None:
        """In the arguments and beside the model: nothing runs, and the export is the same."""

        class Attack:
            def __reduce__(self) -> object:
                return os.system, (f"touch {tmp_path / 'run'}",)

        def attack(state: dict[str, Any]) -> None:
            state["args"].hook = state["hook"] = Attack()

        self.change(saved / "mp_rank_00_000/model_optim_rng.pt", attack)
        convert(dense, saved.parent, tmp_path / "out", "nvfp4")
        assert not (tmp_path / "run").exists()
        same_files(tmp_path / "out", dense.at(tp=2, pp=2) / "live_nvfp4")


class TestGroupedExperts:
    """Transformer Engine's grouped linears, and Megatron's own before them: names by hand, since neither runs here."""

    EXPERTS, RANKS = 8, 2

    def write(self, hf: Path, directory: Path, name: str, *, quantized: bool = False) -> dict[str, Tensor]:
        """Files of two EP ranks; returns all tensors as one rank's checkpoint names them."""
        whole = megatron_state(read_hf_model(hf))
        arguments = Namespace(tensor_model_parallel_size=1, expert_model_parallel_size=2, num_experts=self.EXPERTS)
        for rank in range(self.RANKS):
            model = {key: tensor for key, tensor in whole.items() if ".experts." not in key}
            for layer, linear in product(range(2), ("linear_fc1", "linear_fc2")):
                module = f"decoder.layers.{layer}.mlp.experts"
                mine = range(rank * 4, rank * 4 + 4)
                weights = [whole[f"{module}.experts.{expert}.{linear}.weight"] for expert in mine]
                if name == "weights":
                    packed = torch.stack([weight.t() for weight in weights])
                    rows = packed.shape[1] if linear == "linear_fc1" else -1
                    shape = (rows, packed.numel() // rows) if rows > 0 else (4 * packed.shape[1], -1)
                    model[f"{module}.weight{linear[-1]}"] = packed.reshape(shape)
                    continue
                model |= {f"{module}.{linear}.weight{local}": weight for local, weight in enumerate(weights)}
                model |= quantizers(f"{module}.{linear}", mine) if quantized else {}
            place = directory / "iter_0000007" / f"mp_rank_00_{rank:03d}"
            place.mkdir(parents=True)
            state = {"args": arguments, "checkpoint_version": 3.0, "model": model}
            torch.save(state, place / "model_optim_rng.pt")
        (directory / "latest_checkpointed_iteration.txt").write_text("7")
        return whole

    @pytest.mark.parametrize("name", ["linears", "weights"])
    def test_weights(self, qwen3_moe: Path, tmp_path: Path, name: str) -> None:
        whole = self.write(qwen3_moe, tmp_path / "legacy", name)
        write_state(tmp_path / "dist", whole)
        for form in ("legacy", "dist"):
            AutoBridge.from_hf_pretrained(qwen3_moe).convert_checkpoint(
                tmp_path / form, tmp_path / f"{form}_out", scheme="fp8_dynamic"
            )
        same_files(tmp_path / "legacy_out", tmp_path / "dist_out")

    def test_quantizers(self, qwen3_moe: Path, tmp_path: Path) -> None:
        """Each expert has its weight quantizer; a rank's experts share the input quantizer, and ranks its maximum."""
        self.write(qwen3_moe, tmp_path / "legacy", "linears", quantized=True)
        stored = stored_model(open_checkpoint(tmp_path / "legacy"), read_hf_model(qwen3_moe))
        found = {each.name: each for each in stored.quantizers()}
        assert len(found) == 2 * 2 * (self.EXPERTS + 1)
        for layer, linear in product(range(2), ("linear_fc1", "linear_fc2")):
            module = f"decoder.layers.{layer}.mlp.experts.{linear}"
            assert found[f"{module}.input_quantizer"].attributes["_amax"] == 3.0 + 7
            for expert in range(self.EXPERTS):
                assert found[f"{module}.weight_quantizer.{expert}"].attributes["_amax"] == 1.0 + expert


def quantizers(module: str, experts: Sequence[int]) -> dict[str, Tensor]:
    """What ModelOpt keeps of a grouped linear in a rank's own state: buffers, and settings under local numbers."""
    enabled = {"_disabled": False, "_num_bits": (4, 3), "_axis": None, "_block_sizes": None}
    settings = {f"weight_quantizer.{local}": enabled for local in range(len(experts))}
    settings |= {"input_quantizer": enabled, "output_quantizer": {"_disabled": True}}
    stream = io.BytesIO()
    torch.save({"modelopt_quantizer_state": settings}, stream)
    made = {f"{module}._extra_state": torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)}
    made |= {
        f"{module}.weight_quantizer.{local}._amax": torch.tensor(1.0 + expert) for local, expert in enumerate(experts)
    }
    return {**made, f"{module}.input_quantizer._amax": torch.tensor(3.0 + max(experts))}
