"""Megatron checkpoint → Hugging Face checkpoint in the compressed-tensors format.

python scripts/export.py checkpoint=CKPT hf=HF_DIR output=OUT scheme=nvfp4, or under torchrun to share the work
"""

import sys
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":  # the checkout in place of scripts/, where this file would shadow the package `export`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.schema import ExportConfig
from scripts import cli


def export(options: ExportConfig) -> None:
    """Reads the checkpoint, without Megatron, a model or a GPU, and writes it for serving."""
    from bridge.auto import AutoBridge
    from bridge.ranks import world, world_rank
    from export.model_card import command_line
    from scripts.progress import progress
    from scripts.recipes import recipe_of
    from scripts.tables import export_table

    with world() as ranks, progress(f"exporting to {options.output}") as shown:
        report = AutoBridge.from_hf_pretrained(options.hf, ranks=ranks).convert_checkpoint(
            options.checkpoint,
            options.output,
            scheme=recipe_of(options.scheme, options.ignore),
            missing_amax=options.amax.missing,
            overwrite=options.io.overwrite,
            max_shard_bytes=int(options.io.max_shard_gb * 1e9),
            dry_run=options.dry_run,
            verify=options.verify,
            quant_state=options.quant_state,
            progress=shown,
            record={"command": "export", "command_line": command_line(), "options": asdict(options)},
        )
    if world_rank() == 0:
        export_table(report, options)


if __name__ == "__main__":
    cli.run("export", export)
