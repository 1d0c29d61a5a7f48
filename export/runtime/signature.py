"""What a config group says of weights and inputs, in one value that schemes are chosen by."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from amaxbridge.mappings.errors import UsageError

_ORDERS: Mapping[Any, str] = MappingProxyType({"dynamic": "group", "static": "weight", True: "group"})  # older names


class UnsupportedQuantizationError(UsageError, ValueError):
    """A quantization that the runtime does not compute."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """`QuantizationArgs` of compressed-tensors, as far as they decide how a layer computes.

    Args:
        bits: of a code.
        kind: `int` or `float`.
        strategy: what shares a scale: `tensor`, `channel`, `token`, `group`, `tensor_group`, `block`.
        dynamic: whether scales are made from the values as they come; `local` for those of blocks alone.
        symmetric: without zero points.
        group_size: columns that share a scale; None and -1 are all of them.
        block_structure: rows and columns of a block.
        actorder: the order of columns in GPTQ; `group` has `weight_g_idx`, the group of each column.
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
    def of(cls, args: Mapping[str, Any]) -> "Arguments":
        """From config.json, with the defaults of compressed-tensors.

        Raises:
            UnsupportedQuantizationError: `num_bits` is missing.
        """
        if "num_bits" not in args:
            raise UnsupportedQuantizationError(f"quantization arguments without num_bits: {dict(args)}")
        size, block = args.get("group_size"), args.get("block_structure")
        strategy = args.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
        return cls(
            bits=args["num_bits"],
            kind=args.get("type", "int"),
            strategy=strategy,
            dynamic=args.get("dynamic", False),
            symmetric=args.get("symmetric", True),
            group_size=None if size == -1 else size,
            block_structure=tuple(block) if block else None,
            actorder=_ORDERS.get(args.get("actorder", ""), args.get("actorder")),
        )

    def __str__(self) -> str:
        size = f" of {self.group_size}" if self.group_size else ""
        block = f" of {list(self.block_structure)}" if self.block_structure else ""
        how = f"dynamic={self.dynamic}" if self.dynamic else "static"
        zero = "" if self.symmetric else ", asymmetric"
        return f"{self.kind}{self.bits} by {self.strategy}{size}{block}, {how}{zero}"


@dataclass(frozen=True, slots=True)
class Signature:
    """One config group without its targets; `inputs` is None for weights alone."""

    quant_format: str
    weights: Arguments
    inputs: Arguments | None = None

    @classmethod
    def of(cls, group: Mapping[str, Any], quant_format: str) -> "Signature":
        """From a group of `config_groups`.

        Args:
            group: its `weights`, `input_activations` and `format`.
            quant_format: the format of the whole config, for groups that name none.

        Raises:
            UnsupportedQuantizationError: the group has no weights, or quantizes outputs.
        """
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
