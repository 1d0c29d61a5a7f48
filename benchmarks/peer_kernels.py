"""The peer's side of `kernels.py`, in llm-compressor's environment: prints GB/s by preset as JSON."""

import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

PRESETS = ("NVFP4A16", "MXFP4", "MXFP8", "FP8_DYNAMIC", "FP8_BLOCK", "W4A16", "W4A16_ASYM", "W8A8")


def bf16_weight() -> Tensor:
    """A random weight of 32 MiB."""
    return (torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()


def best_seconds(job: Callable[[], object], runs: int = 7) -> float:
    """The least CPU time of several runs, in seconds, after one that is not counted."""
    job()
    times = []
    for _ in range(runs):
        begin = time.process_time()
        job()
        times.append(time.process_time() - begin)
    return min(times)


def main() -> None:
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
    from llmcompressor.entrypoints.model_free.converter import ModelFreePtqConverter
    from loguru import logger

    logger.remove()
    torch.set_num_threads(1)
    weight = bf16_weight()
    speeds = {}
    for preset in PRESETS:
        config = QuantizationConfig(config_groups={"group_0": preset_name_to_scheme(preset, ["Linear"])})
        converter = ModelFreePtqConverter(config)
        seconds = best_seconds(lambda converter=converter: converter.process({"m.weight": weight}), runs=3)
        speeds[preset] = weight.nbytes / seconds / 1e9
    print(json.dumps(speeds))


if __name__ == "__main__":
    main()
