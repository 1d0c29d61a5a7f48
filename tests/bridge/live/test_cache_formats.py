"""Key-value caches that ModelOpt quantized: per tensor, for each head, NVFP4; live, from the checkpoint, and back."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.bridge.live.collect_amax import collect_scalars
from amaxbridge.bridge.stored.stored_model import StoredModel
from amaxbridge.bridge.stored.torch_dist import DistCheckpoint
from amaxbridge.export.schemes.scheme import arguments
from amaxbridge.export.verify import Severity, verify
from amaxbridge.mappings.errors import AmaxError
from amaxbridge.mappings.ranks import LOCAL
from tests.support.checkpoints import tensors_in
from tests.support.comparing import same_files, same_tensors
from tests.support.hf_models import make_qwen3
from tests.support.launcher import Launcher, LiveRanks
from tests.workers.live_cache import CASES

HEADS, LAYERS = 2, 2
CAST = [float(torch.tensor(448.0) / 2688)]
"""With use_constant_amax ModelOpt computes with an amax of 448, and exports no scale; engines would take 1."""


@pytest.fixture(scope="module")
def live(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    make_qwen3(hf := tmp_path_factory.mktemp("cache_model"))
    return LiveRanks(launch, "live_cache.py", hf, tmp_path_factory.mktemp("cache"))


def reports(directory: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(ranks)]


def stored_scales(directory: Path) -> dict[str, torch.Tensor]:
    """`model.layers.0.k` → the scale, however the format names it."""
    found = {name: tensor for name, tensor in tensors_in(directory).items() if name.endswith(("k_scale", "v_scale"))}
    assert len(found) == 2 * LAYERS
    return {f"{name.partition('.self_attn')[0]}.{name[-7]}": tensor for name, tensor in found.items()}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_scales_are_those_of_training(live: LiveRanks, case: str, tp: int) -> None:
    """ModelOpt's own exporter of Megatron models makes the same; one for each head it does not write."""
    directory = live.at(tp=tp)
    found = reports(directory, tp)
    assert [each[case]["live"] for each in found] == ["written"] * tp
    scales = stored_scales(directory / case)
    for name, scale in scales.items():
        of_ranks = [each[case]["scales"].get(name, CAST) for each in found]
        expected = [*itertools.chain(*of_ranks)] if case == "per_head" else of_ranks[0]
        assert scale.flatten().tolist() == expected, name
        assert scale.shape == {"per_head": (HEADS, 1, 1), "per_tensor": (1,)}.get(case, ())
    if case == "per_head":
        assert all(len(set(scale.flatten().tolist())) == HEADS for scale in scales.values())


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_checkpoint_holds_the_heads_of_all_ranks(live: LiveRanks, case: str, tp: int) -> None:
    directory = live.at(tp=tp)
    assert reports(directory, tp)[0][case]["stored"] == "written"
    same_files(directory / case, directory / f"{case}_stored")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_way_back(live: LiveRanks, case: str, tp: int) -> None:
    """Imported into Megatron, whose quantizers get these amax, and exported again."""
    directory = live.at(tp=tp)
    same_tensors(directory / f"{case}_again", directory / case)


@pytest.mark.parametrize("found", ["live", "stored"])
def test_latent_attention_is_refused_with_the_reason(
    found: str, launch: Launcher, deepseek_v3: Path, shared: Path
) -> None:
    """Training rounds the keys of each head, engines the latent vector that they are made of."""
    live = LiveRanks(launch, "live_cache.py", deepseek_v3, shared / "latent_cache")
    (report,) = reports(live.at(tp=1), 1)
    for case in CASES:
        said = report[case][found]
        assert "enabled quantizers have no mapping" in said
        assert "decoder.layers.0.self_attention.core_attention.k_bmm_quantizer" in said
        assert "Latent attention: training rounds the keys and values of each head" in said
        assert "Disable them before the export" in said


def test_a_checkpoint_with_the_heads_of_one_rank_is_refused(tmp_path: Path) -> None:
    """ModelOpt saves the amax of Transformer Engine's attention as if all ranks had the same."""
    make_qwen3(hf := tmp_path / "hf")
    core = "decoder.layers.0.self_attention.core_attention"
    setting = {"_disabled": False, "_num_bits": (4, 3), "_axis": 2, "_block_sizes": None}
    stream = io.BytesIO()
    torch.save({"modelopt_quantizer_state": {"k_bmm_quantizer": setting}}, stream)
    saved = {
        f"{core}._extra_state/shard_0_1": stream,
        f"{core}.k_bmm_quantizer._amax": torch.ones(1, 1, 1, 1),
        f"{core.replace('core_attention', 'linear_qkv')}.weight": torch.ones(256, 64),
    }
    save(saved, storage_writer=FileSystemWriter(tmp_path / "checkpoint"), no_dist=True)
    model = read_hf_model(hf)
    quantizers = StoredModel(DistCheckpoint(tmp_path / "checkpoint")).quantizers()
    with pytest.raises(AmaxError, match=r"k_bmm_quantizer\._amax: of 1 heads\n.*export from the live model"):
        collect_scalars(quantizers, model.registry, model.model_config, LOCAL)


def test_what_the_configs_say(live: LiveRanks) -> None:
    written = {case: json.loads((live.at(tp=1) / case / "config.json").read_text()) for case in CASES}
    said = {case: config["quantization_config"]["kv_cache_scheme"] for case, config in written.items()}
    assert said == {
        "per_tensor": arguments(8, "float", "tensor"),
        "per_head": arguments(8, "float", "attn_head"),
        "nvfp4": "NVFP4",
        "nvfp4_cast": "NVFP4",
    }
    beside = json.loads((live.at(tp=1) / "nvfp4" / "hf_quant_config.json").read_text())["quantization"]
    assert beside["kv_cache_quant_algo"] == "NVFP4"
    assert "FP8, one scale for each head" in (live.at(tp=1) / "per_head" / "README.md").read_text()


def test_verify_says_which_engines_read_it(live: LiveRanks) -> None:
    found = {
        (case, engine): [finding for finding in verify(live.at(tp=1) / case).findings if finding.of(engine)]
        for case in CASES
        for engine in ("vllm", "sglang")
    }
    unread = {pair for pair, findings in found.items() if any(each.rule == "engine-cache" for each in findings)}
    assert unread == {("per_head", "sglang"), ("nvfp4", "sglang"), ("nvfp4_cast", "sglang")}
    others = {each.rule for findings in found.values() for each in findings if each.severity is not Severity.NOTE}
    assert others == {"engine-cache"}
