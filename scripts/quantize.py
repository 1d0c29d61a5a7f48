"""Hugging Face checkpoint → compressed-tensors, without Megatron and without a model.

python scripts/quantize.py input=HF_DIR output=OUT scheme=nvfp4a16
"""

import sys
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":  # the checkout in place of scripts/, where export.py would shadow the package `export`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.schema import QuantizeConfig
from scripts import cli


def quantize(options: QuantizeConfig) -> None:
    """Quantizes a directory of safetensors, with the amax of a training run if there is one."""
    from export.model_card import command_line
    from export.model_free import model_free_ptq
    from export.pipeline import default_workers
    from scripts.progress import progress
    from scripts.recipes import converters_of, recipe_of
    from scripts.tables import quantize_table

    with progress(f"quantizing to {options.output}") as shown:
        report = model_free_ptq(
            options.input,
            options.output,
            recipe_of(options.scheme),
            options.ignore,
            max_workers=options.workers or default_workers(options.device),
            device=options.device,
            converter=converters_of(options.converter, options.input),
            quant_state=options.quant_state,
            missing_amax=options.amax.missing,
            overwrite=options.io.overwrite,
            dry_run=options.dry_run,
            verify=options.verify,
            progress=shown,
            record={"command": "quantize", "command_line": command_line(), "options": asdict(options)},
        )
    quantize_table(report, options)


if __name__ == "__main__":
    cli.run("quantize", quantize)
