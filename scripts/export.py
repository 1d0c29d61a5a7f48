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
    """Builds the model at the given parallel sizes, loads the checkpoint into it, and writes it for serving."""
    from bridge.auto import AutoBridge
    from bridge.hf_config import check_parallel_sizes
    from bridge.ranks import world_rank, world_size
    from bridge.torch_dist import checkpoint_iteration
    from export.fused_scales import missing_policy
    from export.schemes import find_scheme
    from export.writer import check_output

    check_output(Path(options.output), overwrite=options.overwrite)
    find_scheme(options.scheme)
    missing_policy(options.amax.missing)
    bridge = AutoBridge.from_hf_pretrained(options.hf)
    pp, ep, etp = options.parallel.pp, options.parallel.ep, options.parallel.etp or None
    tp = options.parallel.tp or max(1, world_size() // (pp * ep))
    check_parallel_sizes(bridge.hf, world=world_size(), tp=tp, pp=pp, ep=ep, etp=etp)
    directory = checkpoint_iteration(Path(options.checkpoint))

    from bridge import megatron  # after the checks above, because Megatron takes many seconds to import
    from scripts.tables import export_table

    with megatron.distributed(tp=tp, pp=pp, ep=ep, etp=etp):
        model = megatron.build_model(bridge.hf)
        megatron.load_checkpoint(model, directory)
        report = bridge.save_hf_pretrained(
            model,
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
