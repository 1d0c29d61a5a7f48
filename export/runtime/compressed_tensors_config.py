"""The `quantization_config` of a checkpoint, and which method each layer of a model gets."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from amaxbridge.export.runtime.group_of_module import LINEAR, Matching
from amaxbridge.export.runtime.linear_method import CompressedTensorsLinearMethod
from amaxbridge.export.runtime.signature import Arguments, Signature, UnsupportedQuantizationError

_BLOCK = 128  # rows, columns and inputs that share a scale where weights have square blocks


class CompressedTensorsConfig:
    """A checkpoint's quantization: one group for all linear layers, or, from `from_config`, several.

    Args:
        quant_format: of the tensors on disk: `pack-quantized`, `nvfp4-pack-quantized`, …
        ignore: layers that are left alone: full names, `re:` patterns, classes.
        weight_bits: of a weight's code.
        group_size: inputs that share a scale; None or -1 for all.
        weight_strategy: what shares a scale: `tensor`, `channel`, `group`, `tensor_group`, `block` (of 128 by 128).
        weight_type: `int` or `float`.
        weight_dynamic: always False in a checkpoint.
        symmetric: without zero points.
        actorder: the order of inputs in GPTQ: None, `weight`, `group`.
        input_bits: of an input's code; None leaves inputs alone.
        input_strategy: what shares a scale: `token`, `tensor`, `group`, `tensor_group`.
        input_type: `int` or `float`.
        input_dynamic: whether scales are made from the inputs; `local` for NVFP4's blocks.
        input_symmetric: without zero points.
    """

    def __init__(
        self,
        *,
        quant_format: str,
        ignore: Sequence[str] = (),
        weight_bits: int,
        group_size: int | None = None,
        weight_strategy: str = "channel",
        weight_type: str = "int",
        weight_dynamic: bool = False,
        symmetric: bool = True,
        actorder: str | None = None,
        input_bits: int | None = None,
        input_strategy: str | None = None,
        input_type: str | None = None,
        input_dynamic: bool | str | None = None,
        input_symmetric: bool | None = None,
    ) -> None:
        block = {"block_structure": [_BLOCK, _BLOCK]} if weight_strategy == "block" else {}
        input_size = _BLOCK if block else group_size
        shared_size = {"group_size": input_size} if input_strategy in ("group", "tensor_group") else {}
        weights = Arguments.of(
            {
                "num_bits": weight_bits,
                "type": weight_type,
                "strategy": weight_strategy,
                "dynamic": weight_dynamic,
                "symmetric": symmetric,
                "group_size": None if block else group_size,
                "actorder": actorder,
                **block,
            }
        )
        inputs = None
        if input_bits is not None:
            inputs = Arguments.of(
                {
                    "num_bits": input_bits,
                    "type": input_type or weight_type,
                    "strategy": input_strategy,
                    "dynamic": bool(input_dynamic) if input_dynamic != "local" else "local",
                    "symmetric": input_symmetric is not False,
                    **shared_size,
                }
            )
        self.quant_format = quant_format
        self.signatures: tuple[Signature, ...] = (Signature(quant_format, weights, inputs),)
        self.matching = Matching(ignore=tuple(ignore))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From the `quantization_config` of config.json, with one group or several.

        Raises:
            UnsupportedQuantizationError: it is not of compressed-tensors, has no groups, or has sparsity or transforms.
        """
        if config.get("quant_method", "compressed-tensors") != "compressed-tensors":
            raise UnsupportedQuantizationError(f"quant_method is {config['quant_method']}, not compressed-tensors")
        unknown = [key for key in ("sparsity_config", "transform_config") if config.get(key)]
        if unknown:
            raise UnsupportedQuantizationError(
                f"quantization_config has {', '.join(unknown)}, which is not computed here"
            )
        groups = list(config.get("config_groups", {}).values())
        if not groups:
            raise UnsupportedQuantizationError("quantization_config has no config_groups")
        self = cls.__new__(cls)
        self.quant_format = config.get("format", "")
        self.signatures = tuple(Signature.of(group, self.quant_format) for group in groups)
        self.matching = Matching.of(config)
        return self

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
        """Files beside config.json that hold the config: none."""
        return []

    @property
    def ignore(self) -> list[str]:
        """Layers that are left alone."""
        return list(self.matching.ignore)

    def get_quant_method(self, layer: nn.Module, prefix: str = "") -> CompressedTensorsLinearMethod | None:
        """How a layer loads and computes.

        Args:
            layer: its class decides whether `Linear` means it.
            prefix: its full name; of fused layers the engine's, `model.layers.0.self_attn.qkv_proj`.

        Returns:
            None to leave the layer unquantized: it is ignored, or no target.

        Raises:
            CheckpointError: a fused layer of which a part is ignored, or in another group.
            UnsupportedQuantizationError: its group is nothing that the runtime computes.
        """
        number = self.matching.group_of(prefix, class_names(layer))
        if number is None:
            return None
        return CompressedTensorsLinearMethod(self, self.signatures[number], prefix)


def class_names(layer: nn.Module) -> list[str]:
    """What targets may call a layer's class: its names, and `Linear` for the classes that engines derive from none."""
    names = [base.__name__ for base in type(layer).__mro__]
    return [*names, *LINEAR] if any(name.endswith(("Linear", "LinearBase")) for name in names) else names
