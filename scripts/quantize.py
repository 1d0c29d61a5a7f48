"""Hugging Face checkpoint → compressed-tensors, without Megatron and without a model.

amaxbridge quantize input=HF_DIR output=OUT scheme=nvfp4a16
"""

import time

from amaxbridge import cli
from amaxbridge.configs.schema import QuantizeConfig


def quantize(options: QuantizeConfig) -> None:
    """Quantizes a directory of safetensors, with the amax of a training run if given."""
    from amaxbridge.export.model_free.pipeline import default_workers
    from amaxbridge.export.model_free.whole_directory import model_free_ptq
    from amaxbridge.scripts.progress_bar import progress
    from amaxbridge.scripts.pushing import prepare, push
    from amaxbridge.scripts.recipes import output_keywords, recipe_of
    from amaxbridge.scripts.tables import quantize_table

    prepare(options)
    began = time.monotonic()
    with progress(f"quantizing to {options.output}") as shown:
        report = model_free_ptq(
            options.input,
            options.output,
            recipe_of(options.scheme),
            options.ignore,
            max_workers=options.workers or default_workers(options.device),
            device=options.device,
            converter=options.converter,
            quant_state=options.quant_state,
            architecture=options.architecture,
            revision=options.revision,
            stream=options.io.stream,
            **output_keywords(options, "quantize", shown),
        )
    push(options)
    quantize_table(report, options, time.monotonic() - began)


def main() -> None:
    """`amaxbridge quantize`."""
    cli.run("quantize", quantize)


if __name__ == "__main__":
    main()
