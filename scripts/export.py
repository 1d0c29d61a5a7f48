"""Megatron checkpoint → Hugging Face checkpoint in the compressed-tensors format.

python scripts/export.py checkpoint=CKPT hf=HF_DIR output=OUT scheme=nvfp4, or under torchrun to share the work
"""

import sys
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":  # the checkout in place of scripts/, where this file would shadow the package `export`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.schema import ExportConfig
from mappings.errors import UsageError
from scripts import cli


def export(options: ExportConfig) -> None:
    """Reads the checkpoint, without Megatron, a model or a GPU, and writes it for serving."""
    from bridge.auto import AutoBridge
    from bridge.described import identify
    from bridge.hf_config import read_hf_model
    from bridge.mesh import Mesh
    from bridge.mesh_plan import plan_on_mesh
    from bridge.ranks import world, world_rank
    from bridge.save import SaveOptions
    from scripts.recipes import recipe_of
    from scripts.tables import export_table, mesh_table

    if options.checkpoint is None and not options.dry_run:
        raise UsageError("checkpoint= is required, but for dry_run=true; --help shows all options")
    if options.hf is None:
        found = identify(Path(options.checkpoint)) if options.checkpoint else "there is no checkpoint to tell from"
        raise UsageError(f"hf= is required, for config.json and the tokenizer: {found}")
    how: SaveOptions = {
        "scheme": recipe_of(options.scheme, options.ignore),
        "missing_amax": options.amax.missing,
        "overwrite": options.io.overwrite,
        "max_shard_bytes": int(options.io.max_shard_gb * 1e9),
        "dry_run": options.dry_run,
    }
    if options.checkpoint is None:
        mesh = Mesh.smallest(**asdict(options.parallel))
        mesh_table(plan_on_mesh(read_hf_model(options.hf), mesh, Path(options.output), **how), options)
        return
    with world() as ranks:
        bridge = AutoBridge.from_hf_pretrained(options.hf, ranks=ranks)
        report = bridge.convert_checkpoint(options.checkpoint, options.output, **how)
    if world_rank() == 0:
        export_table(report, options)


if __name__ == "__main__":
    cli.run("export", export)
