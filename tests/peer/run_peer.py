"""llm-compressor's side of `test_parity.py`, in its environment: quantizes one checkpoint with several presets."""

import json
import sys

from llmcompressor import model_free_ptq

if __name__ == "__main__":
    source, jobs = sys.argv[1], json.loads(sys.argv[2])
    for preset, (output, ignore) in jobs.items():
        model_free_ptq(source, output, scheme=preset, ignore=ignore, device="cpu")
