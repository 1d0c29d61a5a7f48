"""Dry runs plan a live export of a model of any size on a mesh that does not exist."""

import json
import shutil
from pathlib import Path

import pytest

from amaxbridge.bridge.hf import HFModel, read_hf_model
from amaxbridge.bridge.plan.dry_run import MeshPlan, plan_import, plan_on_mesh
from amaxbridge.bridge.plan.mesh import Mesh
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.disk.shard_layout import Layout
from amaxbridge.mappings.errors import CheckpointError, UsageError
from amaxbridge.mappings.tensors import TensorSpec
from tests.support.launcher import LiveRanks
from tests.support.paths import PUBLISHED_MODELS


def published(name: str, directory: Path) -> HFModel:
    """A directory that holds nothing but config.json."""
    shutil.copy(PUBLISHED_MODELS / f"{name}.json", directory / "config.json")
    return read_hf_model(directory)


def planned(layout: Layout) -> dict[str, dict[str, TensorSpec]]:
    return {shard.file_name: dict(shard.specs) for shard in layout.shards}


def written(directory: Path) -> dict[str, dict[str, TensorSpec]]:
    with SafetensorsCheckpoint(directory) as checkpoint:
        names = sorted(set(checkpoint.weight_map.values()))
        return {name: {each: stored.spec for each, stored in checkpoint.file(name).tensors.items()} for name in names}


def test_it_is_what_a_live_export_writes(live_moe: LiveRanks, tmp_path: Path) -> None:
    exported = live_moe.at(processes=2, tp=1, ep=2) / "nvfp4"
    plan = plan_on_mesh(read_hf_model(live_moe.hf), Mesh(dp=2, ep=2), tmp_path / "out", max_shard_bytes=60_000)
    assert planned(plan.export.layout) == written(exported)
    assert sum(share.written for share in plan.shares) == plan.export.layout.total_size
    assert not list(tmp_path.iterdir())


def test_deepseek_v3_on_a_thousand_ranks(tmp_path: Path) -> None:
    plan = plan_on_mesh(published("DeepSeek-V3", tmp_path), Mesh.smallest(pp=16, ep=64), tmp_path.with_name("out"))
    assert plan.mesh.world == 1024
    assert sum(share.bundles for share in plan.shares) == len(plan.export.bundles)
    assert sum(share.written for share in plan.shares) == plan.export.layout.total_size
    experts = 256 * 3 * (61 - 3 + 1)  # 58 layers and that for MTP, each expert of three linears
    assert sum(".experts." in name for name in plan.export.quantized) == experts
    assert len(plan.needed_amax) == 2 * len(plan.export.quantized)
    assert max(share.received for share in plan.shares) == 0  # experts lie whole on a rank, and there is no TP


def test_shards_of_a_dense_model_go_to_their_owners(tmp_path: Path) -> None:
    hf = published("Qwen3-8B", tmp_path)
    plans: dict[int, MeshPlan] = {tp: plan_on_mesh(hf, Mesh(tp=tp), tmp_path.with_name("out")) for tp in (1, 4)}
    assert planned(plans[1].export.layout) == planned(plans[4].export.layout)
    model = plans[1].shares[0].held
    held = sum(share.held for share in plans[4].shares)
    assert model < held < 1.01 * model  # norms are on every rank
    received = sum(share.received for share in plans[4].shares)
    assert 0.74 * model < received < 0.75 * model  # of each weight, the three quarters that its owner lacks


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="EP=3 does not divide 128 experts"):
        plan_on_mesh(published("Qwen3-235B-A22B", tmp_path), Mesh.smallest(ep=3), tmp_path.with_name("out"))


class TestImport:
    def test_a_quantized_directory(self, live: LiveRanks) -> None:
        plan = plan_import(read_hf_model(live.at(tp=2) / "nvfp4"), Mesh(tp=2))
        assert plan.schemes == {"nvfp4": 14}
        assert len(set(plan.held)) == 1

    def test_a_missing_shard(self, live: LiveRanks, tmp_path: Path) -> None:
        shutil.copytree(live.at(tp=2) / "nvfp4", tmp_path / "hf")
        next((tmp_path / "hf").glob("*00002-of-*.safetensors")).unlink()
        with pytest.raises(CheckpointError, match="names files that are not there"):
            plan_import(read_hf_model(tmp_path / "hf"), Mesh())

    def test_tensors_that_no_file_has(self, qwen3: Path, tmp_path: Path) -> None:
        shutil.copytree(qwen3, tmp_path / "hf")
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        config |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="lacks 11 tensors of its model"):
            plan_import(read_hf_model(tmp_path / "hf"), Mesh())
