"""Megatron checkpoint → Hugging Face checkpoint in the compressed-tensors format.

python scripts/export.py checkpoint=CKPT hf=HF_DIR output=OUT scheme=nvfp4, or under torchrun to share the work
"""

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # the checkout in place of scripts/, where this file would shadow the package `export`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.schema import ExportConfig
from scripts import cli

if TYPE_CHECKING:
    from bridge.hf_config import HFModel


def export(options: ExportConfig) -> None:
    """Reads the checkpoint, without Megatron, a model or a GPU, and writes it for serving."""
    from bridge.auto import AutoBridge
    from bridge.mesh import Mesh
    from bridge.mesh_plan import plan_on_mesh
    from bridge.ranks import world_rank, world_size
    from bridge.save import SaveOptions
    from export.model_card import command_line
    from export.staging import Share
    from mappings.errors import UsageError
    from scripts.mesh_tables import mesh_table
    from scripts.progress import progress
    from scripts.recipes import recipe_of
    from scripts.tables import export_table

    if options.checkpoint is None and not options.dry_run:
        raise UsageError("checkpoint= is required, but for dry_run=true; --help shows all options")
    share = Share(world_rank(), world_size())
    if options.dry_run and share.rank:
        return
    hf = _described_model(options)
    how: SaveOptions = {
        "scheme": recipe_of(options.scheme),
        "ignore": options.ignore,
        "missing_amax": options.amax.missing,
        "overwrite": options.io.overwrite,
        "max_shard_bytes": int(options.io.max_shard_gb * 1e9),
        "dry_run": options.dry_run,
        "quant_state": options.quant_state,
        "verify": options.verify,
        "record": {"command": "export", "command_line": command_line(), "options": asdict(options)},
    }
    if options.checkpoint is None:
        mesh = Mesh.smallest(**asdict(options.parallel))
        mesh_table(plan_on_mesh(hf, mesh, Path(options.output), **how), options)
        return
    with progress(f"exporting to {options.output}") as shown:
        how["progress"] = shown
        report = AutoBridge(hf).convert_checkpoint(options.checkpoint, options.output, share=share, **how)
    if report.ended:
        export_table(report, options)


def _described_model(options: ExportConfig) -> "HFModel":
    """The model of `hf`, or of the checkpoint's arguments; where `hf` is none, the error says what they tell."""
    from bridge.described import identify
    from bridge.from_arguments import model_of_arguments
    from bridge.hf_config import read_hf_model
    from mappings.errors import CheckpointError, UnknownArchitectureError, UsageError

    if options.hf is None:
        if options.checkpoint is None:
            raise UsageError("hf= is required where there is no checkpoint")
        checkpoint = Path(options.checkpoint)
        return model_of_arguments(checkpoint, architecture=options.architecture, vocab_size=options.vocab_size)
    if options.architecture or options.vocab_size:
        raise UsageError("architecture= and vocab_size= are for a checkpoint without hf=, whose config.json says both")
    try:
        return read_hf_model(options.hf)
    except UnknownArchitectureError:
        raise
    except UsageError as error:
        found = ""
        with contextlib.suppress(CheckpointError):
            found = f"\n{identify(Path(options.checkpoint))}" if options.checkpoint else ""
        raise UsageError(f"{error}{found}") from error


if __name__ == "__main__":
    cli.run("export", export)
