"""MXFP4: 4-bit floats in blocks of 32 under a power of two, `mxfp4-pack-quantized` in compressed-tensors.

weight_packed  uint8  [out, in/2]    two e2m1 values a byte, the even column in the low nibble
weight_scale   uint8  [out, in/32]   E8M0: 2^(scale - 127)
"""

from amaxbridge.export.schemes.mx import mx_quantizer, mx_scheme

_E2M1 = mx_quantizer((2, 1))

MXFP4 = mx_scheme("mxfp4", 4, "mxfp4-pack-quantized", _E2M1, weights_only=False)
MXFP4A16 = mx_scheme("mxfp4a16", 4, "mxfp4-pack-quantized", _E2M1, weights_only=True)
