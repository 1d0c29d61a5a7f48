"""The `quantization_config` of a checkpoint, and which method each layer of a model gets."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from amaxbridge.export.architectures.engines import LINEAR, RUNTIME, Layer, label, read_layer
from amaxbridge.export.output.config_and_index import CONFIG_FILE
from amaxbridge.export.quant_config import ConfigGroup, QuantConfig, read_quant_config
from amaxbridge.export.runtime.linear_method import CompressedTensorsLinearMethod
from amaxbridge.export.schemes.signature import Arguments, Signature, UnsupportedQuantizationError
from amaxbridge.mappings.errors import CheckpointError, listing

_SIZES = (("in_features", "out_features"), ("input_size", "output_size"))
_BLOCK = 128  # rows, columns and inputs that share a scale where weights have square blocks


class CompressedTensorsConfig:
    """A checkpoint's quantization: one group for all linear layers, or, from `from_config`, several.

    Args:
        quant_format: of the tensors on disk: `pack-quantized`, `nvfp4-pack-quantized`, …
        ignore: layers that are left alone: full names, `re:` patterns, classes.
        weight_bits: of a weight's code.
        group_size: inputs that share a scale; None or -1 for all.
        weight_strategy: what shares a scale: `tensor`, `channel`, `group`, `tensor_group`, `block` (of 128 by 128);
            None for `group` or `channel`, as `group_size` says.
        weight_type: `int` or `float`; None for `int`.
        weight_dynamic: always False in a checkpoint.
        symmetric: without zero points.
        actorder: the order of inputs in GPTQ: None, `weight`, `group`.
        input_bits: of an input's code; None leaves inputs alone.
        input_strategy: what shares a scale: `token`, `tensor`, `group`, `tensor_group`.
        input_type: `int` or `float`.
        input_dynamic: True if scales are made from the inputs; `local` for NVFP4's blocks.
        input_symmetric: without zero points.

    Each argument is an attribute, too, as config.json says it. Of several groups, those that differ in it have no
    common one: ask `signatures`.
    """

    def __init__(
        self,
        *,
        quant_format: str,
        ignore: Sequence[str] = (),
        weight_bits: int,
        group_size: int | None = None,
        weight_strategy: str | None = None,
        weight_type: str | None = None,
        weight_dynamic: bool = False,
        symmetric: bool = True,
        actorder: str | None = None,
        input_bits: int | None = None,
        input_strategy: str | None = None,
        input_type: str | None = None,
        input_dynamic: bool | str | None = None,
        input_symmetric: bool | None = None,
    ) -> None:
        is_block = weight_strategy == "block"
        size = None if is_block or group_size == -1 else group_size
        strategy = weight_strategy or ("group" if size else "channel")
        weights = Arguments(
            bits=weight_bits,
            kind=weight_type or "int",
            strategy="channel" if strategy == "group" and size is None else strategy,
            dynamic=weight_dynamic,
            symmetric=symmetric,
            group_size=size,
            block_structure=(_BLOCK, _BLOCK) if is_block else None,
            actorder=actorder,
        )
        inputs = None
        if input_bits is not None:
            inputs = Arguments(
                bits=input_bits,
                kind=input_type or weights.kind,
                strategy=input_strategy or "tensor",
                dynamic=input_dynamic or False,
                symmetric=input_symmetric is not False,
                group_size=(_BLOCK if is_block else size) if input_strategy in ("group", "tensor_group") else None,
            )
        self.quant_format = quant_format
        group = ConfigGroup("group_0", LINEAR, quant_format, Signature(quant_format, weights, inputs))
        self.quant_config = QuantConfig(format=quant_format, groups=(group,), ignore=tuple(ignore))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From the `quantization_config` of config.json, with one group or several.

        Raises:
            UnsupportedQuantizationError: it is not of compressed-tensors, has no groups, or has sparsity or transforms.
        """
        read = read_quant_config(config).checked()
        if not read.groups:
            raise UnsupportedQuantizationError("quantization_config has no config_groups")
        self = cls.__new__(cls)
        self.quant_format, self.quant_config = read.format, read
        return self

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """What each group says of weights and inputs."""
        return tuple(group.signature for group in self.quant_config.groups if group.signature is not None)

    def _common(self, name: str, values: Iterable[Any]) -> Any:
        """What all groups say of one argument.

        Raises:
            UnsupportedQuantizationError: they differ.
        """
        found = list(values)
        if any(value != found[0] for value in found):
            raise UnsupportedQuantizationError(f"{name} differs between config groups ({found}): ask signatures")
        return found[0]

    def _of_weights(self, argument: str, name: str) -> Any:
        return self._common(name, (getattr(each.weights, argument) for each in self.signatures))

    def _of_inputs(self, argument: str, name: str) -> Any:
        """None where inputs are not quantized."""
        return self._common(name, (each.inputs and getattr(each.inputs, argument) for each in self.signatures))

    @property
    def weight_bits(self) -> int:
        return int(self._of_weights("bits", "weight_bits"))

    @property
    def group_size(self) -> int | None:
        """None for one scale for a row, or for a tensor."""
        size: int | None = self._of_weights("group_size", "group_size")
        return size

    @property
    def weight_strategy(self) -> str:
        return str(self._of_weights("strategy", "weight_strategy"))

    @property
    def weight_type(self) -> str:
        return str(self._of_weights("kind", "weight_type"))

    @property
    def weight_dynamic(self) -> bool:
        return bool(self._of_weights("dynamic", "weight_dynamic"))

    @property
    def symmetric(self) -> bool:
        return bool(self._of_weights("symmetric", "symmetric"))

    @property
    def actorder(self) -> str | None:
        order: str | None = self._of_weights("actorder", "actorder")
        return order

    @property
    def input_bits(self) -> int | None:
        bits: int | None = self._of_inputs("bits", "input_bits")
        return bits

    @property
    def input_strategy(self) -> str | None:
        strategy: str | None = self._of_inputs("strategy", "input_strategy")
        return strategy

    @property
    def input_type(self) -> str | None:
        kind: str | None = self._of_inputs("kind", "input_type")
        return kind

    @property
    def input_dynamic(self) -> bool | str:
        """False where inputs are not quantized."""
        dynamic: bool | str | None = self._of_inputs("dynamic", "input_dynamic")
        return dynamic or False

    @property
    def input_symmetric(self) -> bool:
        """False where inputs are not quantized."""
        return bool(self._of_inputs("symmetric", "input_symmetric"))

    @staticmethod
    def get_name() -> str:
        """As `quant_method` in config.json."""
        return "compressed-tensors"

    @staticmethod
    def get_supported_act_dtypes() -> list[torch.dtype]:
        """What inputs may be."""
        return [torch.float32, torch.float16, torch.bfloat16]

    @staticmethod
    def get_min_capability() -> int:
        """The oldest GPU: Turing, for its integer products. bf16 wants Ampere. A CPU will do."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """The files that hold the config."""
        return [CONFIG_FILE]

    @property
    def ignore(self) -> list[str]:
        """Layers that are left alone."""
        return list(self.quant_config.ignore)

    def get_quant_method(self, layer: nn.Module, prefix: str = "") -> CompressedTensorsLinearMethod | None:
        """How a layer loads and computes.

        Args:
            layer: `Linear` means it if it is a linear layer; see `class_names`.
            prefix: its full name; of fused layers the engine's, `model.layers.0.self_attn.qkv_proj`.

        Returns:
            None to leave the layer unquantized: it is ignored, or no target.

        Raises:
            CheckpointError: a fused layer of which a part is ignored, or in another group.
            UnsupportedQuantizationError: its group is nothing that the runtime computes.
        """
        reading = read_layer(RUNTIME, Layer.named(prefix), self.quant_config, tuple(class_names(layer)))
        if reading.conflict:
            rows = [
                f"{name}: {'not quantized' if group is None else label(self.quant_config, group)}"
                for name, group in reading.members.items()
            ]
            raise CheckpointError(
                f"{prefix} runs as one layer, and config.json treats its parts differently:{listing(rows)}\n"
                "Give all of them one config group, or ignore all of them"
            )
        return None if reading.group is None else self._method(reading.group, prefix)

    def _method(self, group: int, prefix: str) -> CompressedTensorsLinearMethod:
        return CompressedTensorsLinearMethod(self, self.signatures[group], prefix)


def class_names(layer: nn.Module) -> list[str]:
    """What targets may call a layer's class: its names, and `Linear` for everything that is a linear layer."""
    names = [base.__name__ for base in type(layer).__mro__]
    return [*names, *LINEAR] if _is_linear(layer) else names


def _is_linear(layer: nn.Module) -> bool:
    """True for torch's linear layer, layers with the sizes of one as engines name them, and empty modules to fill.

    A layer that does not tell its sizes before it is filled is known by its name, as engines give it.
    """
    if isinstance(layer, nn.Linear) or type(layer) is nn.Module:
        return True
    if any(all(isinstance(getattr(layer, name, None), int) for name in names) for names in _SIZES):
        return True
    return any(base.__name__.endswith(("Linear", "LinearBase")) for base in type(layer).__mro__)
