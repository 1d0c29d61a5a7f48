"""A checkpoint read back the way a serving engine reads it, in plain torch; see README.md."""

from amaxbridge.export.runtime.compressed_tensors_config import CompressedTensorsConfig
from amaxbridge.export.runtime.layer_parameters import replace_parameter
from amaxbridge.export.runtime.linear_method import CompressedTensorsLinearMethod
from amaxbridge.export.runtime.load_layers import CompressedLinear, load_linear, load_model_
from amaxbridge.export.runtime.marlin import (
    GPTQ_MARLIN_MIN_THREAD_K,
    GPTQ_MARLIN_MIN_THREAD_N,
    GPTQ_MARLIN_TILE,
    MARLIN_SUPPORTED_GROUP_SIZES,
    SCALAR_TYPE_UINT4,
    SCALAR_TYPE_UINT4B8,
    ScalarType,
    get_scale_perms,
    marlin_make_empty_g_idx,
    marlin_make_workspace,
    marlin_permute_scales,
    marlin_repack,
    marlin_unpack,
    verify_marlin_supported,
    verify_marlin_supports_shape,
)
from amaxbridge.export.runtime.w8a8 import CompressedTensorsW8A8Int8Scheme
from amaxbridge.export.runtime.wna16 import CompressedTensorsWNA16Scheme
from amaxbridge.export.schemes.signature import Signature, UnsupportedQuantizationError

__all__ = [
    "GPTQ_MARLIN_MIN_THREAD_K",
    "GPTQ_MARLIN_MIN_THREAD_N",
    "GPTQ_MARLIN_TILE",
    "MARLIN_SUPPORTED_GROUP_SIZES",
    "SCALAR_TYPE_UINT4",
    "SCALAR_TYPE_UINT4B8",
    "CompressedLinear",
    "CompressedTensorsConfig",
    "CompressedTensorsLinearMethod",
    "CompressedTensorsW8A8Int8Scheme",
    "CompressedTensorsWNA16Scheme",
    "ScalarType",
    "Signature",
    "UnsupportedQuantizationError",
    "get_scale_perms",
    "load_linear",
    "load_model_",
    "marlin_make_empty_g_idx",
    "marlin_make_workspace",
    "marlin_permute_scales",
    "marlin_repack",
    "marlin_unpack",
    "replace_parameter",
    "verify_marlin_supported",
    "verify_marlin_supports_shape",
]
