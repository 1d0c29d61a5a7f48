"""Hugging Face checkpoint, plain or compressed-tensors → Megatron distributed checkpoint.

torchrun --nproc-per-node 4 scripts/import_hf.py hf=HF_DIR output=CKPT parallel.tp=2 parallel.pp=2
"""

import sys
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":  # the checkout in place of scripts/, where export.py would shadow the package `export`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configs.schema import ImportConfig
from scripts import cli


def import_hf(options: ImportConfig) -> None:
    """Builds the Megatron model, fills it, with quantizers and amax if the source is quantized, and saves it."""
    from bridge.hf_config import check_parallel_sizes, read_hf_model
    from bridge.mesh import Mesh
    from bridge.mesh_plan import plan_import
    from bridge.ranks import process_group, world_rank, world_size
    from export.staging import check_output
    from scripts.mesh_tables import import_plan_table, import_table

    hf, sizes = read_hf_model(options.hf), asdict(options.parallel)
    check_output(Path(options.output), overwrite=options.io.overwrite)
    if options.dry_run:
        if world_rank() == 0:
            import_plan_table(plan_import(hf, Mesh.smallest(**sizes)), options)
        return
    check_parallel_sizes(hf, world=world_size(), **{axis: size for axis, size in sizes.items() if axis != "vpp"})
    from bridge import import_hf as importing  # here, because Megatron takes many seconds to import
    from bridge import megatron

    with process_group(), megatron.distributed(**sizes):
        report = importing.import_hf(
            hf,
            Path(options.output),
            dtype=importing.parameter_dtype(options.model.dtype),
            model_class=options.model.model_class,
            overwrite=options.io.overwrite,
        )
    if world_rank() == 0:
        import_table(report, options)


if __name__ == "__main__":
    cli.run("import_hf", import_hf)
