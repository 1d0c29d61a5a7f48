"""NVFP4 whose blocks have calibrated or learned amax: four-over-six, MSE, local Hessian, LSQ and Dual-LSQ.

The oracle is ModelOpt itself: the codes and scales of its exporter, and the weights of its fake quantizer. Where a
scale lies exactly between two of E4M3, its exporter and its fake quantizer differ; then the exporter counts.
"""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import StaticBlockScaleQuantizer, TensorQuantizer
from safetensors.torch import load_file
from torch import Tensor

from amaxbridge.bridge import AutoBridge
from amaxbridge.export.kernels import e2m1
from amaxbridge.export.kernels.nvfp4_scales import learned_scale
from amaxbridge.export.schemes import SCHEMES
from amaxbridge.mappings.errors import UsageError
from tests.support.checkpoints import tensors_in
from tests.support.hf_models import make_qwen3_moe
from tests.support.launcher import Launcher, LiveRanks

EVERYWHERE = ("four_over_six", "four_over_six_a16", "lsq", "lsq_tied", "dual_lsq", "dual_lsq_unrounded")
CALIBRATED = ("mse_four_over_six", "mse_sweep")


@pytest.fixture(scope="module")
def ranks(launch: Launcher, transformers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    """A dense layer and one with experts, whose down projections have one block for each of two ranks."""
    del transformers
    sizes = {"num_hidden_layers": 2, "num_experts": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
    hf = make_qwen3_moe(tmp_path_factory.mktemp("static_model"), sizes)
    return LiveRanks(launch, "live_static_blocks.py", hf, tmp_path_factory.mktemp("static_blocks"))


@pytest.mark.parametrize("case", [*EVERYWHERE, *CALIBRATED])
def test_an_export_is_what_modelopt_computes(ranks: LiveRanks, case: str) -> None:
    directory = ranks.at(tp=1)
    written, oracle = tensors_in(directory / case), load_file(directory / f"{case}.safetensors")
    scheme = SCHEMES["nvfp4a16" if case.endswith("a16") else "nvfp4"]
    modules = [name.removesuffix(".weight.fake") for name in oracle if name.endswith(".fake")]
    assert len(modules) == 2 * 4 + 3 + 2 * 3
    for module in modules:
        found = {
            name.removeprefix(f"{module}."): each for name, each in written.items() if name.startswith(f"{module}.")
        }
        assert ("input_global_scale" in found) is (scheme.name == "nvfp4")
        dequantized, fake = scheme.dequantize(found), oracle[f"{module}.weight.fake"]
        if case in CALIBRATED:
            agreed = exporter(oracle, module) == fake
            torch.testing.assert_close(dequantized[agreed], fake[agreed], rtol=2**-7, atol=0)  # an ulp of bf16
        else:
            assert torch.equal(dequantized, fake), module
        if "lsq" not in case:
            assert torch.equal(found["weight_packed"], oracle[f"{module}.weight.packed"]), module
            assert torch.equal(found["weight_scale"].view(torch.uint8), oracle[f"{module}.weight.scale"]), module
            assert 1 / found["weight_global_scale"] == pytest.approx(oracle[f"{module}.weight.factor"][:1, 0], 1e-7)


def exporter(oracle: dict[str, Tensor], module: str) -> Tensor:
    """The dequantized weights of ModelOpt's exporter."""
    scale = oracle[f"{module}.weight.scale"].view(torch.float8_e4m3fn).float() * oracle[f"{module}.weight.factor"]
    codes = e2m1.unpack(oracle[f"{module}.weight.packed"]).unflatten(1, (-1, 16))
    return (codes * scale[..., None]).flatten(1).bfloat16()


def assert_same(found: Path, expected: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("case", EVERYWHERE)
def test_tensor_parallel_ranks_write_what_one_does(ranks: LiveRanks, case: str) -> None:
    assert_same(ranks.at(tp=2) / case, ranks.at(tp=1) / case)


@pytest.mark.parametrize(("tp", "case"), [(1, case) for case in (*EVERYWHERE, *CALIBRATED)] + [(2, "four_over_six")])
def test_a_checkpoint_gives_the_same_bytes(ranks: LiveRanks, tmp_path: Path, case: str, tp: int) -> None:
    live = ranks.at(tp=tp) / case
    AutoBridge.from_hf_pretrained(ranks.hf).convert_checkpoint(
        ranks.at(tp=tp) / f"checkpoint_{case}", tmp_path / "out", scheme="auto"
    )
    assert_same(tmp_path / "out", live)


@pytest.mark.parametrize("case", EVERYWHERE)
def test_a_legacy_checkpoint_gives_the_same_bytes(ranks: LiveRanks, tmp_path: Path, case: str) -> None:
    """Ranks' blocks are joined as rows and columns of the weight, also where a rank has one block of a row."""
    AutoBridge.from_hf_pretrained(ranks.hf).convert_checkpoint(
        ranks.at(tp=2) / f"legacy_{case}", tmp_path / "out", scheme="auto"
    )
    assert_same(tmp_path / "out", ranks.at(tp=2) / case)


def test_a_scheme_by_name_takes_every_calibration(ranks: LiveRanks, tmp_path: Path) -> None:
    bridge, checkpoint = AutoBridge.from_hf_pretrained(ranks.hf), ranks.at(tp=1) / "checkpoint_dual_lsq"
    bridge.convert_checkpoint(checkpoint, tmp_path / "out", scheme="nvfp4")
    assert tensors_in(tmp_path / "out").keys() == tensors_in(ranks.at(tp=1) / "dual_lsq").keys()
    with pytest.raises(UsageError, match="scheme=fp8 needs fp8 quantizers, but the model has"):
        bridge.convert_checkpoint(checkpoint, tmp_path / "other", scheme="fp8")


def test_steps_of_learned_blocks_are_modelopts_to_the_bit() -> None:
    """A step that is off by an ulp turns the codes of weights that lie between two codes."""
    settings = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}}
    generator = torch.Generator().manual_seed(11)
    for of_group in (10 ** (4 * torch.rand(200, generator=generator) - 3)).tolist():
        learned = of_group * torch.rand(8, 1, generator=generator)
        plain = TensorQuantizer(QuantizerAttributeConfig(**settings))
        plain.amax = learned
        quantizer = StaticBlockScaleQuantizer.from_tensor_quantizer(plain, torch.tensor(of_group))
        quantizer.enable_lsq()
        expected = quantizer._block_scale_from_amax(quantizer.amax_pre, quantize=True)
        assert torch.equal(learned_scale(learned, torch.tensor(of_group))[1], expected), of_group
