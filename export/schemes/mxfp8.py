"""MXFP8: E4M3 in blocks of 32 under a power of two, `mxfp8-quantized` in compressed-tensors.

weight        float8_e4m3fn  [out, in]
weight_scale  uint8          [out, in/32]   E8M0: 2^(scale - 127)
"""

from amaxbridge.export.schemes.mx import mx_quantizer, mx_scheme

_E4M3 = mx_quantizer((4, 3))

MXFP8 = mx_scheme("mxfp8", 8, "mxfp8-quantized", _E4M3, weights_only=False)
MXFP8A16 = mx_scheme("mxfp8a16", 8, "mxfp8-quantized", _E4M3, weights_only=True)
