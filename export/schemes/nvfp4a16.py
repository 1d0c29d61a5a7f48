"""NVFP4 weights, 16-bit activations: the tensors of `nvfp4` without the scale of the input, which engines refuse."""

from amaxbridge.export.schemes.nvfp4 import NVFP4

NVFP4A16 = NVFP4("nvfp4a16", needs_input_amax=False)
