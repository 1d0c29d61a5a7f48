"""The dtype that an export is written in: that of the checkpoint, of config.json, or the requested one.

Training often keeps weights in fp32, but engines serve 16 bits. So fp32 weights are cast to the dtype in config.json.
Nothing else is cast unless requested: a cast between 16-bit formats would lose range or bits, and a cast to fp32 would
only double the size. config.json of the output names the dtype that was written.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.weight_dtypes import DTYPE_FIELDS, DTYPES, dtype_option, stated_dtype
from amaxbridge.export.disk.row_chunks import Rows, WholeTensor
from amaxbridge.export.output.finalizer import Bundle
from amaxbridge.export.schemes import Scheme
from amaxbridge.mappings.errors import MappingError, UsageError
from amaxbridge.mappings.names import is_quantizer_state
from amaxbridge.mappings.tensors import TensorSpec

_log = logging.getLogger("amaxbridge")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Casting:
    """The casts of an export.

    Args:
        target: dtype that weights are cast to; None for no cast.
        kept: name suffixes of the tensors that stay in fp32.
        written: the dtype of most weights in the output; None without weights.
        note: message for users, "" for none.
        uncast: names of weights that are quantized as they are, in fp32.
    """

    target: torch.dtype | None
    kept: tuple[str, ...] = ()
    written: torch.dtype | None = None
    note: str = ""
    uncast: frozenset[str] = frozenset()

    @classmethod
    def of(cls, hf: HFModel, specs: Mapping[str, TensorSpec], wanted: str | None) -> Self:
        """The casting of an export.

        Args:
            specs: every Hugging Face tensor.
            wanted: `bfloat16`, `float16` or `float32`; None to cast only fp32 weights, to the dtype in config.json.

        Raises:
            UsageError: the dtype is unknown, or without `wanted` that in config.json is.
        """
        kept = hf.family.kept_in_fp32
        if wanted is not None:
            target = dtype_option("dtype", wanted)
            return cls(target, kept, target)
        held, said = _held(specs), stated_dtype(hf.written, hf.family.language_part)
        if held is None or said is None or held == said:
            return cls(None, kept, held)
        there, here = _NAMES[held], _NAMES[said]
        if held == torch.float32:
            note = (
                f"the weights are {there}, but config.json says {here}: they are cast to it; dtype={there} keeps them"
            )
            return cls(said, kept, said, note)
        note = (
            f"the weights are {there}, but config.json says {here}: they stay {there}, as the output's config.json says"
        )
        return cls(None, kept, held, note)

    def specs(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """The tensors of a model as written unquantized."""
        return {name: replace(spec, dtype=self._dtype(name, spec.dtype)) for name, spec in specs.items()}

    def bundle(self, bundle: Bundle) -> Bundle:
        """The bundle, cast.

        Raises:
            MappingError: a weight is too large for the dtype. The message names it.
        """
        if self.target is None:
            return bundle
        return replace(bundle, tensors={name: self._cast(name, rows) for name, rows in bundle.tensors.items()})

    def sparing(self, quantized: Mapping[str, Scheme]) -> "Casting":
        """The casting that leaves the weights of quantized modules in fp32.

        Raises:
            UsageError: a scheme needs scales in the dtype that the others are cast to.
        """
        bound = sorted({scheme.name for scheme in quantized.values() if scheme.scales_in_model_dtype})
        if bound and self.target not in (None, torch.float32):
            raise UsageError(
                f"weights=fp32_main: engines hold the scales of {', '.join(bound)} in the dtype of the model, so that "
                "fp32 weights gain nothing: give dtype=float32, or leave weights= out"
            )
        return replace(self, uncast=frozenset(f"{module}.weight" for module in quantized))

    def described(self, hf: HFModel) -> HFModel:
        """The model with a config.json that names the written dtype, in the fields it already has."""
        if self.written is None:
            return hf
        name, part = _NAMES[self.written], hf.family.language_part
        fields = _with_dtype(hf.written, name)
        if part is not None and any(field in hf.written.get(part, {}) for field in DTYPE_FIELDS):
            fields[part] = _with_dtype(hf.written[part], name)
        return replace(hf, written=fields)

    def announce(self) -> None:
        """Logs the message for users."""
        if self.note:
            _log.warning("%s", self.note)

    def _dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        casts = dtype in _NAMES and not is_quantizer_state(name) and name not in self.uncast
        return self.target if self.target is not None and casts and not name.endswith(self.kept) else dtype

    def _cast(self, name: str, rows: Rows) -> Rows:
        dtype = self._dtype(name, rows.spec.dtype)
        if dtype == rows.spec.dtype:
            return rows
        whole = torch.cat([part.rows for part in rows.parts()]) if rows.spec.shape else next(iter(rows.parts())).rows
        return WholeTensor(_checked(name, whole, whole.to(dtype)))


def _checked(name: str, before: Tensor, after: Tensor) -> Tensor:
    if after.dtype == torch.float16 and bool((before.isfinite() & ~after.isfinite()).any()):
        raise MappingError(f"{name} has values up to {before.abs().max():g}, beyond float16: give dtype=bfloat16")
    return after


def _held(specs: Mapping[str, TensorSpec]) -> torch.dtype | None:
    """The dtype of most weights."""
    count = Counter[torch.dtype]()
    for name, spec in specs.items():
        if spec.dtype in _NAMES and not is_quantizer_state(name):
            count[spec.dtype] += spec.nbytes // spec.dtype.itemsize
    return count.most_common(1)[0][0] if count else None


def _with_dtype(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    spelled = [field for field in DTYPE_FIELDS if field in fields] or [DTYPE_FIELDS[0]]
    return {**fields, **dict.fromkeys(spelled, name)}
