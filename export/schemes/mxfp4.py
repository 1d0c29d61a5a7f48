"""MXFP4: 4-bit floats in blocks of 32 under a power of two, `mxfp4-pack-quantized` in compressed-tensors.

weight_packed  uint8  [out, in/2]    two e2m1 values a byte, the even column in the low nibble
weight_scale   uint8  [out, in/32]   E8M0: 2^(scale - 127)
"""

from amaxbridge.export.schemes.mx import MX

MXFP4 = MX("mxfp4", 4, "mxfp4-pack-quantized")
MXFP4A16 = MX("mxfp4a16", 4, "mxfp4-pack-quantized", weights_only=True)
