"""Megatron checkpoint → Hugging Face checkpoint in the compressed-tensors format.

torchrun --nproc-per-node N scripts/export.py checkpoint=CKPT hf=HF_DIR output=OUT scheme=nvfp4
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout in place of scripts/, where this file would shadow the package `export`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.schema import ExportConfig
from scripts import cli


def export(options: ExportConfig) -> None:
    """Reads the checkpoint, without Megatron, a model or a GPU, and writes it for serving."""
    from bridge.auto import AutoBridge
    from bridge.hf_config import read_hf_model
    from bridge.ranks import world, world_rank
    from bridge.torch_dist import checkpoint_iteration
    from export.fused_scales import missing_policy
    from export.schemes import find_scheme
    from export.writer import check_output
    from scripts.tables import export_table

    check_output(Path(options.output), overwrite=options.overwrite)
    find_scheme(options.scheme)
    missing_policy(options.amax.missing)
    hf = read_hf_model(options.hf)
    directory = checkpoint_iteration(Path(options.checkpoint))
    with world() as ranks:
        report = AutoBridge(hf, ranks).convert_checkpoint(
            directory,
            options.output,
            scheme=options.scheme,
            missing_amax=options.amax.missing,
            overwrite=options.overwrite,
            max_shard_bytes=int(options.max_shard_gb * 1e9),
            dry_run=options.dry_run,
        )
    if world_rank() == 0:
        export_table(report, options)


if __name__ == "__main__":
    cli.run("export", export)
