"""Per-channel and per-block amax, and input scales, of real ModelOpt quantizers on tensor-parallel ranks.

The oracle is the Hugging Face weight itself: the amax of a row of q_proj is the largest element of that row, however
Megatron interleaved and sharded it.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.amax.quant_state_file import read_quant_state
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.export.output.config_and_index import QUANT_STATE_FILE
from amaxbridge.mappings.amax import PRE_QUANT_SCALE, WEIGHT_QUANTIZER
from tests.support.checkpoints import tensors_in
from tests.support.hard_weights import same_bytes
from tests.support.launcher import Launcher
from tests.support.paths import WORKERS


@pytest.fixture(scope="module")
def collected(launch: Launcher, qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """TP size → the directory that the ranks of that size wrote."""
    root = tmp_path_factory.mktemp("granularity")
    for tp in (1, 2):
        launch(WORKERS / "live_granularity.py", qwen3, root / f"tp{tp}", tp, processes=tp)
    return {tp: root / f"tp{tp}" for tp in (1, 2)}


def state(directory: Path, case: str) -> dict[str, Tensor]:
    """The state of all ranks together. Values that several ranks hold must be equal."""
    merged: dict[str, Tensor] = {}
    for file in sorted(directory.glob(f"{case}_*.pt")):
        for name, tensor in torch.load(file).items():
            assert name not in merged or torch.equal(merged[name], tensor), name
            merged[name] = tensor
    return merged


def modules_of(source: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in source if "_proj" in name]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", ["fp8_per_channel", "int8_per_channel", "nvfp4_static"])
def test_amax_of_rows_and_blocks_follow_their_weights(
    collected: dict[int, Path], qwen3: Path, case: str, tp: int
) -> None:
    source, found = tensors_in(qwen3), state(collected[tp], case)
    for module in modules_of(source):
        weight = source[f"{module}.weight"].float().abs()
        expected = weight.unflatten(1, (-1, 16)).amax(-1) if case == "nvfp4_static" else weight.amax(1, keepdim=True)
        assert torch.equal(found[module + WEIGHT_QUANTIZER], expected), module
    if case == "int8_per_channel":  # static inputs, one number each
        assert all(found[f"{module}.input_quantizer._amax"].ndim == 0 for module in modules_of(source))


def test_tensor_parallel_ranks_collect_what_one_does(collected: dict[int, Path]) -> None:
    for case in ("fp8_per_channel", "int8_per_channel", "smoothquant", "nvfp4_static"):
        one, two = state(collected[1], case), state(collected[2], case)
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            assert tensor.shape == two[name].shape, name
            exact = case in ("fp8_per_channel", "nvfp4_static") or (case == "int8_per_channel" and "weight" in name)
            torch.testing.assert_close(two[name], tensor, rtol=0 if exact else 0.05, atol=0)


@pytest.mark.parametrize("tp", [1, 2])
def test_input_scales_are_folded_into_plain_weights(collected: dict[int, Path], qwen3: Path, tp: int) -> None:
    """SmoothQuant divided the weights and multiplies the inputs; a plain export must compute the original function."""
    source, plain = tensors_in(qwen3), tensors_in(collected[tp] / "folded")
    scales = state(collected[tp], "smoothquant")
    for module in modules_of(source):
        scale = scales[module + PRE_QUANT_SCALE]
        assert scale.shape == (source[f"{module}.weight"].shape[1],)
        assert scale.unique().numel() > 1, "the scale must do something for this to show anything"
        torch.testing.assert_close(plain[f"{module}.weight"], source[f"{module}.weight"], rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("tp", [1, 2])
def test_static_blocks_quantize_with_the_amax_of_training(collected: dict[int, Path], qwen3: Path, tp: int) -> None:
    """Each block's amax is that of its own weights, so the bytes equal those of ModelOpt's static export."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    source, written = tensors_in(qwen3), tensors_in(collected[tp] / "static")
    module = "model.layers.0.mlp.down_proj"
    weight = source[f"{module}.weight"]
    second = weight.abs().max().float() / 2688
    expected, scale, _ = NVFP4QTensor.quantize(weight, 16, weights_scaling_factor_2=second)
    assert torch.equal(written[f"{module}.weight_scale"].view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(written[f"{module}.weight_packed"], expected._quantized_data)


@pytest.mark.parametrize("tp", [1, 2])
def test_state_goes_back_into_megatron_and_out_again(collected: dict[int, Path], tp: int) -> None:
    """Hugging Face → Megatron → Hugging Face, weights and amax: the same bytes."""
    static, mirrored = collected[tp] / "static", collected[tp] / "mirrored"
    for path in static.iterdir():
        assert (mirrored / path.name).read_bytes() == path.read_bytes(), path.name
        assert (collected[1] / "static" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("tp", [1, 2])
def test_state_beside_plain_weights_is_all_that_a_later_run_needs(
    collected: dict[int, Path], tmp_path: Path, tp: int
) -> None:
    """bf16 weights and quant_state.safetensors, quantized without Megatron, give the bytes of the Megatron export."""
    plain, static = collected[tp] / "plain", collected[tp] / "static"
    config = json.loads((plain / "config.json").read_text())
    saved = read_quant_state(plain / QUANT_STATE_FILE, config, tensors_in(plain))
    assert saved.amax.keys() == state(collected[tp], "nvfp4_static").keys()
    assert all(torch.equal(saved.amax[name], amax) for name, amax in state(collected[tp], "nvfp4_static").items())
    model_free_ptq(plain, tmp_path / "out", "nvfp4", quant_state=saved)
    expected, found = tensors_in(static), tensors_in(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(same_bytes(found[name], tensor) for name, tensor in expected.items())
    for name in (QUANT_STATE_FILE, "model.safetensors", "model.safetensors.index.json"):  # whatever the ranks
        assert (plain / name).read_bytes() == (collected[1] / "plain" / name).read_bytes(), name


def test_state_is_not_kept_beside_weights_that_it_would_not_fit(collected: dict[int, Path]) -> None:
    assert "14 input scales folded into" in (collected[2] / "refused.txt").read_text()
    assert not (collected[2] / "refused").exists()


def test_the_largest_block_stands_for_the_tensor() -> None:
    values = {"m.weight_quantizer._amax": torch.ones(2, 3), "m.weight_quantizer._global_amax": torch.tensor(4.0)}
    amax = QuantState(values, {"m": "nvfp4"}).weight_amax("m")
    assert amax is not None
    assert amax.item() == 4.0
