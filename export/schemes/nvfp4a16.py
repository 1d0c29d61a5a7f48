"""NVFP4 weights, 16-bit activations: the tensors of `nvfp4` without the input scale, which engines refuse."""

from amaxbridge.export.schemes.nvfp4 import WEIGHTS, WHOLE_BLOCKS, NVFP4Scheme
from amaxbridge.export.schemes.quantizer_settings import BLOCKS_OF_E2M1

NVFP4A16 = NVFP4Scheme(
    "nvfp4a16",
    format="nvfp4",
    config_group={"format": "nvfp4-pack-quantized", "weights": WEIGHTS, "input_activations": None},
    weight_quantizer=BLOCKS_OF_E2M1,
    shard_multiple=WHOLE_BLOCKS,
)
