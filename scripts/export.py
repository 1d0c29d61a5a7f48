"""Megatron checkpoint → Hugging Face checkpoint in the compressed-tensors format.

amaxbridge export checkpoint=CKPT hf=HF_DIR output=OUT scheme=nvfp4, or under torchrun to share the work
"""

import contextlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from amaxbridge import cli
from amaxbridge.configs.schema import ExportConfig

if TYPE_CHECKING:
    from amaxbridge.bridge.hf import HFModel
    from amaxbridge.output_options import SaveKeywords


def export(options: ExportConfig) -> None:
    """Exports a checkpoint without Megatron, a model in memory or a GPU."""
    from amaxbridge.bridge.auto import AutoBridge
    from amaxbridge.bridge.live.process_ranks import world_rank, world_size
    from amaxbridge.bridge.plan.dry_run import plan_on_mesh
    from amaxbridge.bridge.plan.mesh import Mesh
    from amaxbridge.export.disk.staging import Share
    from amaxbridge.mappings.errors import UsageError
    from amaxbridge.scripts.mesh_tables import mesh_table
    from amaxbridge.scripts.progress_bar import progress
    from amaxbridge.scripts.pushing import prepare, push
    from amaxbridge.scripts.recipes import output_keywords, recipe_of
    from amaxbridge.scripts.tables import export_table

    if options.checkpoint is None and not options.dry_run:
        raise UsageError("checkpoint= is required unless dry_run=true; --help shows all options")
    began = time.monotonic()
    share = Share(world_rank(), world_size())
    if options.dry_run and share.rank:
        return
    hf = _described_model(options)
    if not share.rank:
        prepare(options)
    how: SaveKeywords = {
        **output_keywords(options, "export"),
        "scheme": recipe_of(options.scheme),
        "ignore": options.ignore,
        "max_shard_bytes": int(options.io.max_shard_gb * 1e9),
        "quant_state": options.quant_state,
        "dtype": options.dtype,
        "weights": options.weights,
        "adapter": options.adapter.mode,
        "adapter_alpha": options.adapter.alpha,
        "adapter_base": options.adapter.base,
        "weight_amax": options.amax.weights,
    }
    if options.checkpoint is None:
        mesh = Mesh.smallest(**asdict(options.parallel))
        mesh_table(plan_on_mesh(hf, mesh, Path(options.output), **how), options, time.monotonic() - began)
        return
    with progress(f"exporting to {options.output}") as shown:
        how["progress"] = shown
        report = AutoBridge(hf).convert_checkpoint(options.checkpoint, options.output, share=share, **how)
    if report.ended:
        push(options)
        export_table(report, options, time.monotonic() - began)


def _described_model(options: ExportConfig) -> "HFModel":
    """The model of `hf`, or of the checkpoint's arguments. If `hf` is no model, the error adds what they tell."""
    from amaxbridge.bridge.hf import read_hf_model
    from amaxbridge.bridge.stored.config_from_arguments import model_of_arguments
    from amaxbridge.bridge.stored.identification import identify
    from amaxbridge.mappings.errors import CheckpointError, UnknownArchitectureError, UsageError

    if options.hf is None:
        if options.checkpoint is None:
            raise UsageError("hf= is required where there is no checkpoint")
        checkpoint = Path(options.checkpoint)
        return model_of_arguments(
            checkpoint, architecture=options.architecture, vocab_size=options.vocab_size, family=options.family
        )
    if options.vocab_size:
        raise UsageError("vocab_size= is for a checkpoint without hf=, whose config.json says it")
    try:
        return read_hf_model(
            options.hf,
            options.family,
            architecture=options.architecture,
            num_labels=options.num_labels,
            revision=options.revision,
        )
    except UnknownArchitectureError:
        raise
    except UsageError as error:
        found = ""
        with contextlib.suppress(CheckpointError):
            found = f"\n{identify(Path(options.checkpoint))}" if options.checkpoint else ""
        raise UsageError(f"{error}{found}") from error


def main() -> None:
    """`amaxbridge export`."""
    cli.run("export", export)


if __name__ == "__main__":
    main()
