"""What a scheme's tensors may be in a file, for whoever reads one: `verify`, and the way back to training."""

from itertools import product

import torch

from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.schemes.scheme import Scheme
from amaxbridge.mappings.tensors import TensorSpec

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_SHAPE = "weight_shape"


def stored_specs(scheme: Scheme, shape: tuple[int, int]) -> dict[str, frozenset[TensorSpec]]:
    """Local name of each tensor of a weight `[out, in]` → the specs that are right.

    There are several because scales have the dtype of the weight, or fp32 where an amax was calibrated; and a shape may
    be counted in int32, too.

    Raises:
        ValueError: the scheme cannot hold a weight of this shape.
    """
    specs: dict[str, set[TensorSpec]] = {}
    for dtype, arithmetic in product(_FLOATS, Arithmetic):
        for name, spec in scheme.tensor_specs(TensorSpec(shape, dtype), arithmetic).items():
            specs.setdefault(name, set()).add(spec)
    if _SHAPE in specs:
        specs[_SHAPE] |= {TensorSpec((2,), torch.int32)}
    return {name: frozenset(allowed) for name, allowed in specs.items()}
