"""The signature of a config group: how it quantizes weights and inputs. Schemes and layers are chosen by it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from amaxbridge.export.disk.strict_json import misfit
from amaxbridge.mappings.errors import UsageError

_ORDERS: Mapping[Any, str | None] = MappingProxyType(
    {"dynamic": "group", "static": "weight", True: "group", False: None}  # older spellings
)
_WITHOUT_MEANING = frozenset(("observer", "observer_kwargs", "scale_dtype", "zp_dtype"))
"""Keys about how scales were found, or about their dtype, which the tensors themselves have."""
ARGUMENT_KEYS = _WITHOUT_MEANING | {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"
}  # fmt: skip
_FORM: Any = {
    "num_bits": int,
    "type": (str, None),
    "strategy": (str, None),
    "dynamic": (bool, str, None),
    "symmetric": (bool, None),
    "group_size": (int, None),
    "block_structure": (str, [int], None),
    "actorder": (str, bool, None),
}
_GROUPED = ("group", "tensor_group")
_GROUP: Any = {"format": (str, None), "weights": ({}, None), "input_activations": ({}, None)}
_STRATEGIES = ("tensor", "channel", "token", "block", "attn_head", *_GROUPED)
_DYNAMIC = ("tensor", "token", *_GROUPED)


class UnsupportedQuantizationError(UsageError, ValueError):
    """A `quantization_config` is malformed, or asks for what is not supported."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The part of compressed-tensors' `QuantizationArgs` that decides how a layer computes.

    Args:
        bits: bits of a code.
        kind: `int` or `float`.
        strategy: what shares a scale: `tensor`, `channel`, `token`, `group`, `tensor_group`, `block`; of the key-value
            cache also `attn_head`.
        dynamic: True if scales are made at run time, `local` if only block scales are.
        symmetric: False if there are zero points.
        group_size: columns that share a scale; None for all columns.
        block_structure: rows and columns of a block.
        actorder: the order of columns in GPTQ; with `group`, `weight_g_idx` holds the group of each column.
    """

    bits: int
    kind: str
    strategy: str
    dynamic: bool | str = False
    symmetric: bool = True
    group_size: int | None = None
    block_structure: tuple[int, ...] | None = None
    actorder: str | None = None

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Self:
        """Reads config.json's arguments, with compressed-tensors' defaults and rules.

        Raises:
            UnsupportedQuantizationError: `num_bits` is missing, keys contradict each other, or a key is unknown.
        """
        unknown = sorted(args.keys() - ARGUMENT_KEYS)
        if unknown:
            raise UnsupportedQuantizationError(f"quantization arguments have unknown keys: {', '.join(unknown)}")
        if args.get("num_bits") is None:
            raise UnsupportedQuantizationError(f"quantization arguments without num_bits: {dict(args)}")
        if wrong := misfit(dict(args), _FORM):
            raise UnsupportedQuantizationError(f"quantization arguments are wrong: {wrong}")
        size, block, order = args.get("group_size"), args.get("block_structure"), args.get("actorder")
        if isinstance(block, str):
            block = [int(part) if part.isdigit() else 0 for part in block.split("x")]
        inferred = "tensor" if size is None else "channel" if size == -1 else "group"
        found = cls(
            bits=args["num_bits"],
            kind=str(args.get("type", "int")).lower(),
            strategy=str(args.get("strategy") or inferred).lower(),
            dynamic=args.get("dynamic") or False,
            symmetric=args.get("symmetric") is not False,
            group_size=None if size == -1 else size,
            block_structure=tuple(block) if block else None,
            actorder=_ORDERS.get(order, order),
        )
        if problem := found._contradiction():
            raise UnsupportedQuantizationError(f"{problem}: {dict(args)}")
        return found

    def _contradiction(self) -> str | None:
        """What compressed-tensors would refuse in these arguments; None if nothing."""
        size, block = self.group_size, self.block_structure
        if self.kind not in ("int", "float") or self.strategy not in _STRATEGIES:
            return f"unknown type {self.kind} or strategy {self.strategy}"
        if self.dynamic not in (False, True, "local") or (self.dynamic and self.strategy not in _DYNAMIC):
            return f"dynamic={self.dynamic} does not go with strategy {self.strategy}"
        if (self.dynamic == "local" and self.strategy != "tensor_group") or (
            self.strategy == "token" and not self.dynamic
        ):
            return f"strategy {self.strategy} does not go with dynamic={self.dynamic}"
        if size is not None and (not isinstance(size, int) or size <= 0):
            return f"group_size must be positive, or -1 for a whole row, not {size}"
        if (size is None) == (self.strategy in _GROUPED):
            return f"strategy {self.strategy} does not go with group_size {size}"
        if (block is None) == (self.strategy == "block"):
            return f"strategy {self.strategy} does not go with block_structure {block}"
        if block is not None and (len(block) != 2 or not all(isinstance(side, int) and side > 0 for side in block)):
            return "block_structure must be two positive numbers: rows, columns"
        return None

    def __str__(self) -> str:
        size = f" of {self.group_size}" if self.group_size else ""
        block = f" of {list(self.block_structure)}" if self.block_structure else ""
        how = f"dynamic={self.dynamic}" if self.dynamic else "static"
        zero = "" if self.symmetric else ", asymmetric"
        return f"{self.kind}{self.bits} by {self.strategy}{size}{block}, {how}{zero}"


@dataclass(frozen=True, slots=True)
class Signature:
    """A config group without its targets; `inputs` is None for weight-only groups."""

    quant_format: str
    weights: Arguments
    inputs: Arguments | None = None

    @classmethod
    def of(cls, group: Mapping[str, Any], quant_format: str = "") -> Self:
        """From a group of `config_groups`.

        Args:
            group: its `weights`, `input_activations` and `format`.
            quant_format: the format of the whole config, for groups without their own.

        Raises:
            UnsupportedQuantizationError: the group has no weights, quantizes outputs, or its arguments are malformed.
        """
        if wrong := misfit(dict(group), _GROUP):
            raise UnsupportedQuantizationError(f"a config group is wrong: {wrong}")
        if not group.get("weights"):
            raise UnsupportedQuantizationError(f"a config group without weights, for {group.get('targets')}")
        if group.get("output_activations"):
            raise UnsupportedQuantizationError(
                f"output_activations, for {group.get('targets')}: no engine computes them"
            )
        inputs = group.get("input_activations")
        return cls(
            group.get("format") or quant_format,
            Arguments.of(group["weights"]),
            Arguments.of(inputs) if inputs else None,
        )

    def __str__(self) -> str:
        return f"{self.quant_format}: weights {self.weights}; inputs {self.inputs or 'not quantized'}"
