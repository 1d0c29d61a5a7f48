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
    from bridge.ranks import world, world_rank
    from bridge.save import SaveOptions
    from export.model_card import command_line
    from mappings.errors import UsageError
    from scripts.mesh_tables import mesh_table
    from scripts.progress import progress
    from scripts.recipes import recipe_of
    from scripts.tables import export_table

    if options.checkpoint is None and not options.dry_run:
        raise UsageError("checkpoint= is required, but for dry_run=true; --help shows all options")
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
    with world() as ranks, progress(f"exporting to {options.output}") as shown:
        how["progress"] = shown
        report = AutoBridge(hf, ranks).convert_checkpoint(options.checkpoint, options.output, **how)
    if world_rank() == 0:
        export_table(report, options)


def _described_model(options: ExportConfig) -> "HFModel":
    """The model of `hf`; where that has no config.json, the error says what the checkpoint itself tells."""
    from bridge.described import identify
    from bridge.hf_config import read_hf_model
    from mappings.errors import CheckpointError, UnknownArchitectureError, UsageError

    try:
        if options.hf is None:
            raise UsageError("hf= is required: config.json and the tokenizer come from it")
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
