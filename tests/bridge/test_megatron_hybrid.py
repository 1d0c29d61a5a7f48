"""HybridModel on real Megatron ranks: it exports the bytes of a GPTModel, and models that GPTModel cannot build."""

import json
import tempfile
from pathlib import Path

import pytest

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.mappings.errors import UsageError
from tests.support.comparing import label, same_files, same_tensors
from tests.support.launcher import Launcher, LiveRanks
from tests.support.tiny_models import TINY_MODELS

TOPOLOGIES: list[dict[str, int]] = [
    {},
    {"processes": 2, "tp": 2},
    {"processes": 2, "tp": 1, "ep": 2},
    {"processes": 2, "tp": 1, "pp": 2},
    {"processes": 4, "tp": 1, "pp": 2, "vpp": 2, "ep": 2},
    {"processes": 4, "tp": 2, "pp": 2, "ep": 2, "etp": 1},
]


@pytest.fixture(scope="module")
def live_hybrid(launch: Launcher, qwen3_moe_mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    """The exports of a transformer that is a HybridModel, `*E*E*-*E`."""
    return LiveRanks(launch, "live_hybrid.py", qwen3_moe_mixed, tmp_path_factory.mktemp("live_hybrid"))


@pytest.fixture(scope="module")
def live_mamba(launch: Launcher, nemotron_h: Path, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    """The exports of a Nemotron-H."""
    return LiveRanks(launch, "live_hybrid.py", nemotron_h, tmp_path_factory.mktemp("live_mamba"))


@pytest.fixture(scope="module")
def live_hybrid_mtp(launch: Launcher, deepseek_v3_mtp: Path, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    """The exports of a HybridModel with latent attention and multi-token prediction layers, `+-+E/+E/+E`."""
    return LiveRanks(launch, "live_hybrid.py", deepseek_v3_mtp, tmp_path_factory.mktemp("live_hybrid_mtp"))


@pytest.mark.parametrize("sizes", TOPOLOGIES, ids=label)
def test_a_transformer_exports_the_bytes_of_its_gpt_model(
    live_moe_mixed: LiveRanks, live_hybrid: LiveRanks, sizes: dict[str, int]
) -> None:
    gpt, hybrid = live_moe_mixed.at(), live_hybrid.at(**sizes)
    same_files(gpt / "plain", hybrid / "plain")
    same_files(gpt / "nvfp4", hybrid / "nvfp4")
    same_files(gpt / "nvfp4", hybrid / "mirrored")  # the amax went to Hugging Face names and back


@pytest.mark.parametrize("sizes", [{}, {"processes": 2, "tp": 2}, {"processes": 2, "tp": 1, "pp": 2}], ids=label)
def test_latent_attention_and_mtp_layers_too(
    live_mtp: LiveRanks, live_hybrid_mtp: LiveRanks, sizes: dict[str, int]
) -> None:
    gpt, hybrid = live_mtp.at(), live_hybrid_mtp.at(**sizes)
    same_files(gpt / "plain", hybrid / "plain")
    same_files(gpt / "nvfp4", hybrid / "nvfp4")


@pytest.mark.parametrize("sizes", TOPOLOGIES, ids=label)
def test_mamba_attention_mlp_and_experts(live_mamba: LiveRanks, sizes: dict[str, int]) -> None:
    one, other = live_mamba.at(), live_mamba.at(**sizes)
    same_tensors(other / "plain", live_mamba.hf)
    same_files(one / "nvfp4", other / "nvfp4")
    same_files(one / "nvfp4", other / "mirrored")


@pytest.mark.parametrize("model", ["live_hybrid", "live_hybrid_mtp", "live_mamba"])
def test_a_checkpoint_exports_the_same_bytes(model: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(model).at()
    same_files(directory / "nvfp4", directory / "loaded")


@pytest.mark.parametrize("sizes", TOPOLOGIES[:4], ids=label)
@pytest.mark.parametrize("model", ["live_hybrid", "live_mamba"])
def test_its_files_export_the_same_bytes(
    model: str, sizes: dict[str, int], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The checkpoint is read without Megatron, and its topology does not matter."""
    live: LiveRanks = request.getfixturevalue(model)
    bridge = AutoBridge.from_hf_pretrained(live.hf)
    bridge.convert_checkpoint(live.at(**sizes) / "checkpoint", tmp_path / "out", max_shard_bytes=60_000)
    same_files(tmp_path / "out", live.at(**sizes) / "nvfp4")


@pytest.mark.parametrize("sizes", [{}, {"processes": 2, "tp": 2}], ids=label)
def test_so_do_those_of_latent_attention_and_mtp_layers(
    live_hybrid_mtp: LiveRanks, sizes: dict[str, int], tmp_path: Path
) -> None:
    bridge = AutoBridge.from_hf_pretrained(live_hybrid_mtp.hf)
    bridge.convert_checkpoint(live_hybrid_mtp.at(**sizes) / "checkpoint", tmp_path / "out", max_shard_bytes=60_000)
    same_files(tmp_path / "out", live_hybrid_mtp.at(**sizes) / "nvfp4")


def test_other_layers_and_another_class_are_refused(live_hybrid: LiveRanks, live_mamba: LiveRanks) -> None:
    def refusals(live: LiveRanks) -> list[str]:
        messages: list[str] = json.loads((live.at() / "refusals.json").read_text())
        return messages

    (other_layers,) = refusals(live_hybrid)
    assert "hybrid_layer_pattern: the Megatron model has *-*E*-*E, config.json gives *E*E*-*E" in other_layers
    other_layers, no_gpt_model = refusals(live_mamba)
    assert "has M-*-M/*E/*E, config.json gives M-*EM/*E/*E" in other_layers
    assert no_gpt_model == "NemotronHForCausalLM is a HybridModel in Megatron, not a GPTModel"


ONLY_GPT = {  # model → what HybridModel lacks; the parity of the others is that of their GPTModel
    "Llama 3, tied": "a scaled rotary embedding (rope_type llama3)",
    "GPT-OSS": "window_attn_skip_freq by layer",
    "GLM-4": "a rotary embedding of neighbouring columns (rotary_interleaved), norms after attention and MLP",
    "GLM-4, old": "a rotary embedding of neighbouring columns (rotary_interleaved)",
    "ERNIE-4.5": "a rotary embedding of neighbouring columns (rotary_interleaved)",
    "Exaone 4": "norms after attention and MLP, window_attn_skip_freq by layer, no_rope_freq by layer",
    "Exaone 4 without windows": "norms after attention and MLP, window_attn_skip_freq by layer",
    "SmolLM3": "no_rope_freq by layer",
    "OLMo 2": "norms after attention and MLP",
    "OLMo 3": "norms after attention and MLP, window_attn_skip_freq by layer",
    "Granite": "embedding_multiplier, residual_multiplier, logits_scaling",
    "Granite, MoE": "embedding_multiplier, residual_multiplier, logits_scaling",
    "Llama 4": "a rotary embedding of neighbouring columns (rotary_interleaved), no_rope_freq by layer",
    "dots.llm1": "window_attn_skip_freq by layer",
}


def lacking(rank: int) -> dict[str, str]:
    """Model → why it is no HybridModel."""
    from amaxbridge.bridge.megatron.hybrid_model import check_hybrid

    refusals = {}
    for name, tiny in TINY_MODELS.items():
        if tiny.unbuildable or "images" in name:
            continue
        with tempfile.TemporaryDirectory() as directory:
            tiny.make().save_pretrained(directory)
            hf = read_hf_model(directory)
            if hf.family.model_class == "gpt":
                try:
                    check_hybrid(hf)
                except UsageError as error:
                    refusals[name] = str(error)
    return refusals


def test_what_it_would_compute_otherwise_is_refused(launch: Launcher, tmp_path: Path) -> None:
    [refusals] = launch.results(lacking, tmp_path, processes=1)
    assert refusals.keys() == ONLY_GPT.keys()
    for name, lacks in ONLY_GPT.items():
        assert f"HybridModel lacks {lacks}, which " in refusals[name]
        assert "model.model_class=gpt" in refusals[name]
