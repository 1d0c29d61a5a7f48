"""The oracle of model-free PTQ: the same weights, quantized in memory and all at once."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.output.finalizer import Bundle, Finalizer
from amaxbridge.export.schemes import find_scheme
from amaxbridge.mappings.tensors import TensorSpec


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Asserts that names, dtypes and bytes are the same."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def expected(tensors: Mapping[str, Tensor], scheme: Any, state: QuantState | None = None) -> dict[str, Tensor]:
    """The tensors that must be written for these."""
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    return dict(Finalizer(specs, find_scheme(scheme), state).finalize(Bundle.of(tensors)))
