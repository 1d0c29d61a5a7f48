"""What speaks against a scheme."""

import pytest
import torch

from amaxbridge.export.output.module_schemes import check_blocks_are_whole
from amaxbridge.export.schemes import SCHEMES
from amaxbridge.mappings.errors import MappingError
from amaxbridge.mappings.tensors import TensorSpec

WEIGHT = TensorSpec((256, 192), torch.bfloat16)


@pytest.mark.parametrize(
    ("scheme", "whole", "cut"),
    [
        ("w4a16", (256, 2), (256, 4)),  # two ranks, each with 96 columns in one block of 128
        ("fp8_block", (2, 2), (2, 4)),
        ("nvfp4", (256, 12), (256, 14)),
        ("fp8_dynamic", (256, 1), (256, 2)),
    ],
)
def test_blocks_that_ranks_cut_through(scheme: str, whole: tuple[int, ...], cut: tuple[int, ...]) -> None:
    def check(shape: tuple[int, ...]) -> None:
        amax = TensorSpec(shape, torch.float32)
        check_blocks_are_whole({"m": SCHEMES[scheme]}, {"m.weight": WEIGHT, "m.weight_quantizer._amax": amax})

    check(whole)
    with pytest.raises(MappingError, match=r"(?s)m: weight .* cuts through blocks") as refusal:
        check(cut)
    assert str(list(cut)) in str(refusal.value)
