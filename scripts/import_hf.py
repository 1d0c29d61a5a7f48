"""Hugging Face checkpoint, plain or compressed-tensors → Megatron distributed checkpoint.

torchrun --nproc-per-node 4 -m amaxbridge import hf=HF_DIR output=CKPT parallel.tp=2 parallel.pp=2
"""

import time
from dataclasses import asdict

from amaxbridge import cli
from amaxbridge.configs.schema import ImportConfig


def import_hf(options: ImportConfig) -> None:
    """Builds the Megatron model, fills it (quantizers and amax included if the source is quantized) and saves it."""
    from amaxbridge.bridge.hf import check_parallel_sizes, read_hf_model
    from amaxbridge.bridge.live.process_ranks import process_group, world_rank, world_size
    from amaxbridge.bridge.plan.dry_run import plan_import
    from amaxbridge.bridge.plan.mesh import Mesh
    from amaxbridge.bridge.weight_dtypes import dtype_option
    from amaxbridge.export.disk.output_place import resolved_output
    from amaxbridge.export.disk.staging import check_output
    from amaxbridge.scripts.mesh_tables import import_plan_table, import_table

    began = time.monotonic()
    hf, sizes = read_hf_model(options.hf, options.family, revision=options.revision), asdict(options.parallel)
    output = resolved_output(options.output)
    check_output(output, overwrite=options.io.overwrite)
    if options.dry_run:
        if world_rank() == 0:
            import_plan_table(plan_import(hf, Mesh.smallest(**sizes)), options)
        return
    hf.family.check_buildable(hf.config)
    check_parallel_sizes(hf, world=world_size(), **{axis: size for axis, size in sizes.items() if axis != "vpp"})
    from amaxbridge.bridge import import_hf as importing  # imported here, because Megatron takes many seconds
    from amaxbridge.bridge import megatron

    with process_group(), megatron.distributed(**sizes):
        report = importing.import_hf(
            hf,
            output,
            dtype=dtype_option("model.dtype", options.model.dtype),
            model_class=options.model.model_class,
            overwrite=options.io.overwrite,
            hash_source=options.io.hash_source,
        )
    if world_rank() == 0:
        import_table(report, options, time.monotonic() - began)


def main() -> None:
    """`amaxbridge import`."""
    cli.run("import_hf", import_hf)


if __name__ == "__main__":
    main()
