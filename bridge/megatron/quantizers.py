"""ModelOpt's quantizers in a model that training has not calibrated: inserted all disabled, then enabled one by one."""

from collections.abc import Mapping, Sequence
from typing import Any

import modelopt.torch.quantization as mtq
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from torch import nn

from mappings.errors import UsageError

_WEIGHTS: Mapping[str, Mapping[str, Any]] = {  # format of a scheme → a preset of ModelOpt whose weights have it
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "mxfp4": mtq.MXFP4_DEFAULT_CFG,
    "mxfp8": mtq.MXFP8_DEFAULT_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8_channel": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "fp8_block": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
    "int8": mtq.INT8_WEIGHT_ONLY_CFG,
    "int4": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
}
_INPUTS: Mapping[str, Mapping[str, Any]] = {  # scheme → the preset whose inputs are its; others leave inputs alone
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "mxfp4": mtq.MXFP4_DEFAULT_CFG,
    "mxfp8": mtq.MXFP8_DEFAULT_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8_dynamic": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "w8a8": {
        "quant_cfg": [
            {
                "quantizer_name": "*input_quantizer",
                "cfg": {"num_bits": 8, "axis": None, "type": "dynamic", "block_sizes": {-1: None}},
            }
        ]
    },
}


def insert_quantizers(chunks: Sequence[nn.Module]) -> None:
    """Makes every module that ModelOpt can quantize one with quantizers, all of them disabled.

    Raises:
        UsageError: ModelOpt has no quantizers for the model at these parallel sizes.
    """
    config: Any = chunks[0].config
    if len(chunks) > 1:
        raise UsageError("ModelOpt does not save quantizers of a virtual pipeline: import without parallel.vpp")
    if config.num_moe_experts and config.expert_model_parallel_size > 1 and config.tensor_model_parallel_size > 1:
        raise UsageError(
            f"ModelOpt has no quantizers for experts at TP={config.tensor_model_parallel_size} and "
            f"EP={config.expert_model_parallel_size}: import at parallel.tp=1 or parallel.ep=1"
        )
    mtq.quantize(chunks[0], {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": None})


def enable_weights(quantizer: Any, format_name: str) -> None:
    """Makes a quantizer of weights what ModelOpt's presets have for a format, as `quant_state.format_name` names it."""
    _enable(quantizer, _WEIGHTS[format_name], "*weight_quantizer")


def enable_inputs(quantizer: Any, scheme: str) -> None:
    """The same of inputs, for a scheme by name; it stays disabled where the scheme has none, or ModelOpt has not."""
    if scheme in _INPUTS:
        _enable(quantizer, _INPUTS[scheme], "*input_quantizer")


def _enable(quantizer: Any, preset: Mapping[str, Any], name: str) -> None:
    settings = next(each["cfg"] for each in preset["quant_cfg"] if each["quantizer_name"] == name)
    quantizer.set_from_attribute_config(QuantizerAttributeConfig(**{**settings, "enable": True}))
