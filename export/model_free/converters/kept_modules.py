"""Modules that converters of others leave quantized: a checkpoint of several groups, whose config says so."""

from collections.abc import Mapping

import torch

from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.model_free.converters.scheme_weight import check_specs
from amaxbridge.export.quant_config import QuantConfig
from amaxbridge.export.schemes import SCHEMES, Scheme
from amaxbridge.mappings.errors import UsageError, listing
from amaxbridge.mappings.tensors import TensorSpec

_CODES_AND_SCALES = ("weight_packed", "weight_scale")


def kept_modules(specs: Mapping[str, TensorSpec], config: QuantConfig) -> dict[str, Scheme]:
    """The modules that are still quantized after all converters → their scheme.

    Args:
        specs: the tensors that the converters make.
        config: what the converters say of them (`update_config`).

    Raises:
        UsageError: modules are quantized, and the config does not say how, or says otherwise; all are named.
    """
    modules: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in specs.items():
        module, _, local = name.rpartition(".")
        modules.setdefault(module, {})[local] = spec
    kept, problems = dict[str, Scheme](), list[str]()
    for module, tensors in modules.items():
        if tensors.keys().isdisjoint(_CODES_AND_SCALES):
            continue
        scheme = config.scheme_of(module)
        if scheme is None:
            problems.append(f"{module}: the config has no scheme for it, and it has {', '.join(sorted(tensors))}")
            continue
        try:
            shape = scheme.weight_shape(tensors)
            if shape is None:
                raise ValueError(f"{scheme.codes} is missing, or not of a matrix")
            planned = scheme.tensor_specs(TensorSpec(shape, torch.bfloat16), Arithmetic.MODELOPT)
            if missing := sorted(planned.keys() - tensors.keys()):
                raise ValueError(f"{scheme.name} needs {', '.join(missing)}, which is missing")
            check_specs(scheme, shape, {name: spec for name, spec in tensors.items() if name != "bias"})
            kept[module] = scheme
        except ValueError as error:
            problems.append(f"{module}: {error}")
    if problems:
        raise UsageError(
            f"the converter leaves {len(problems)} modules quantized in a way that is not written here:"
            f"{listing(problems)}\nDequantize them, or have update_config say how they are quantized. "
            f"Known: {', '.join(SCHEMES)}"
        )
    return kept
