"""Weights that `mtq.compress` packed, exported from their codes, bit for bit: live, from checkpoints, at TP=1 and 2."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amaxbridge.bridge.live.compressed_weights import (
    Packing,
    amax_of_scales,
    check_unpackable,
    faults_of_ranks,
    unpacked,
)
from amaxbridge.export.kernels import scaled
from amaxbridge.mappings.errors import UsageError
from tests.support.checkpoints import tensors_in
from tests.support.comparing import same_files
from tests.support.hf_models import make_qwen3_moe
from tests.support.launcher import Launcher, LiveRanks
from tests.workers.live_compressed import CASES

READ = ("nvfp4", "fp8", "fp8_dynamic", "int4")
DOWN = "model.layers.0.mlp.down_proj"
SIZES = {
    "intermediate_size": 128, "moe_intermediate_size": 64, "num_experts": 2, "num_hidden_layers": 2,
    "mlp_only_layers": [0],
}  # fmt: skip


@pytest.fixture(scope="module")
def live(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    hf = make_qwen3_moe(tmp_path_factory.mktemp("compressed_model"), SIZES)
    return LiveRanks(launch, "live_compressed.py", hf, tmp_path_factory.mktemp("compressed"))


def of_ranks(directory: Path, case: str, what: str, tp: int) -> Tensor:
    """Codes, scales or the values of the first down projection, of all ranks: columns are spread over them."""
    return torch.cat([torch.load(directory / f"{case}_{rank}.pt")[what] for rank in range(tp)], -1)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", READ)
def test_the_codes_are_those_that_modelopt_packed(live: LiveRanks, case: str, tp: int) -> None:
    directory = live.at(tp=tp)
    written, codes = tensors_in(directory / case), of_ranks(directory, case, "codes", tp)
    if case == "nvfp4":
        assert torch.equal(written[f"{DOWN}.weight_packed"], codes)
        scale = of_ranks(directory, case, "scale", tp)
        assert torch.equal(written[f"{DOWN}.weight_scale"].view(torch.uint8), scale.view(torch.uint8))
    elif case == "int4":
        signed = torch.stack((codes >> 4, codes & 0xF), -1).flatten(1).to(torch.int8) - 8
        assert torch.equal(written[f"{DOWN}.weight_packed"], scaled.pack_codes(signed, 4))
        parts = [torch.load(directory / f"{case}_{rank}.pt")["scale"].view(64, -1) for rank in range(tp)]
        assert torch.equal(written[f"{DOWN}.weight_scale"], (1 / torch.cat(parts, 1).float()).bfloat16())
    else:
        assert torch.equal(written[f"{DOWN}.weight"].view(torch.uint8), codes.view(torch.uint8))
        scale = torch.load(directory / f"{case}_0.pt")["scale"].float()
        assert torch.equal(written[f"{DOWN}.weight_scale"].flatten(), scale.flatten())


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", READ)
def test_the_checkpoint_gives_the_same(live: LiveRanks, case: str, tp: int) -> None:
    directory = live.at(tp=tp)
    same_files(directory / case, directory / f"{case}_stored")
    same_files(directory / f"{case}_plain", directory / f"{case}_plain_stored")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", READ)
def test_unquantized_weights_are_those_that_modelopt_computes_with(live: LiveRanks, case: str, tp: int) -> None:
    """Its INT4 and FP8 round products in bf16, where their scales are bf16."""
    directory = live.at(tp=tp)
    found = tensors_in(directory / f"{case}_plain")[f"{DOWN}.weight"]
    expected = of_ranks(directory, case, "plain", tp)
    if case == "nvfp4":
        assert torch.equal(found, expected)
    assert torch.isclose(found.float(), expected.float(), rtol=2**-7, atol=0).all()


def test_what_is_not_read_is_refused_by_name(live: LiveRanks) -> None:
    one = json.loads((live.at(tp=1) / "0.json").read_text())
    two = json.loads((live.at(tp=2) / "0.json").read_text())
    assert one.keys() == CASES.keys()
    for report in (one, two):
        assert all(said == "written" for case in READ for said in report[case].values())
        assert (
            "weight_quantizer (2 quantizers): _fake_quant=False: the weight itself is stored" in report["int8"]["live"]
        )
        assert "packed by ModelOpt (mtq.compress) as INT8QTensor" in report["int8"]["stored"]
    assert set(one["int4_over_rows"].values()) == {"written"}
    for said in two["int4_over_rows"].values():  # blocks of 64 in 32 columns of a rank go over rows
        assert "weights that mtq.compress packed cannot be written from their codes" in said
        assert "decoder.layers.1.mlp.experts.linear_fc2.weight0: codes [64, " in said
        assert "Export the model from before mtq.compress" in said


def test_ranks_with_scales_of_their_own_are_refused() -> None:
    """Codes of several ranks fit one global scale only if all were made with it."""
    same, other = {"a.weight_quantizer": "5e", "b.weight_quantizer": "0f"}, {"a.weight_quantizer": "71"}
    assert faults_of_ranks([same, same, {}]) == []
    assert faults_of_ranks([same, other]) == ["a.weight_quantizer: ranks packed it under 2 scales"]
    with pytest.raises(UsageError, match=r"cannot be written from their codes:\n  a\.weight_quantizer: ranks packed"):
        check_unpackable(faults_of_ranks([same, other]))


def test_every_code_of_nvfp4_survives() -> None:
    """Negative zeros, and blocks of zeros, which say more than their values."""
    codes = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    codes[:, ::8] = 0x77  # every block that ModelOpt makes holds a 6
    scale, double = torch.full((8, 4), 2.0).to(torch.float8_e4m3fn), torch.tensor(0.01)
    plain = unpacked(Packing.NVFP4, codes, scale, double, restores=False)
    restored = unpacked(Packing.NVFP4, codes, scale, double, restores=True)
    assert torch.equal(plain.abs() < 1e-30, restored.abs() < 1e-30)
    assert (restored[plain == 0] != 0).any()
    assert torch.equal(amax_of_scales(Packing.NVFP4, scale, double) / torch.tensor(2688.0), double)
