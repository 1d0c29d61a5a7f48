"""llm-compressor's side of `test_peer_converters.py`, in its environment: one checkpoint for each converter."""

import sys

from compressed_tensors.entrypoints.convert import AutoAWQConverter, FP8BlockDequantizer, ModelOptNvfp4Converter
from llmcompressor import model_free_ptq

if __name__ == "__main__":
    root, attention, mlp, *untouched = sys.argv[1:]
    for name, scheme, converter in (
        ("fp8_block", "NVFP4A16", FP8BlockDequantizer(targets=[attention])),
        ("modelopt", "FP8_DYNAMIC", ModelOptNvfp4Converter(targets=[mlp])),
        ("awq", "FP8_DYNAMIC", AutoAWQConverter(group_size=64, targets=[attention])),
    ):
        model_free_ptq(
            f"{root}/{name}", f"{root}/{name}_peer", scheme=scheme, ignore=untouched, device="cpu", converter=converter
        )
