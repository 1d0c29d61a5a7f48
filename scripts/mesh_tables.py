"""Tables about a Megatron mesh: dry runs and imports."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from amaxbridge.bridge.plan.dry_run import ImportPlan, MeshPlan
from amaxbridge.configs.schema import ExportConfig, ImportConfig
from amaxbridge.export.output.model_card import size_text
from amaxbridge.mappings.amax import INPUT_QUANTIZER
from amaxbridge.scripts.showing import show, show_end, show_rows
from amaxbridge.scripts.tables import export_table

if TYPE_CHECKING:
    from amaxbridge.bridge.import_hf import ImportReport  # which imports Megatron


def mesh_table(plan: MeshPlan, options: ExportConfig, seconds: float) -> None:
    """Prints the dry run of an export from a mesh: the whole, and each rank's share."""
    export_table(plan.export, options, seconds)
    mesh = plan.mesh
    sizes = f"TP={mesh.tp} PP={mesh.pp} EP={mesh.ep} ETP={mesh.etp} DP={mesh.dp}"
    table = Table(title=f"of {mesh.world:,} ranks, {sizes}", title_justify="left")
    for column in ("of each rank", "least", "mean", "most"):
        table.add_column(column, justify="left" if column == "of each rank" else "right")
    for what, name in (
        ("bytes of the model that it holds", "held"),
        ("fused groups that it writes", "bundles"),
        ("bytes received", "received"),
        ("bytes written", "written"),
        ("peak memory on top, bytes", "peak"),
    ):
        values = [getattr(share, name) for share in plan.shares]
        table.add_row(what, *(f"{value:,.0f}" for value in (min(values), sum(values) / len(values), max(values))))
    show(table)
    free = plan.export.quantized and not any(name.endswith(INPUT_QUANTIZER) for name in plan.needed_amax)
    or_none = ", or no quantizers: it is quantized without data then" if free else ""
    print(f"The checkpoint must have {len(plan.needed_amax):,} amax{or_none}.")


def import_plan_table(plan: ImportPlan, options: ImportConfig) -> None:
    """Prints the dry run of an import."""
    rows = {f"modules quantized as {scheme}": count for scheme, count in plan.schemes.items()}
    rows |= {"bytes that a rank holds, least": min(plan.held), "bytes that a rank holds, most": max(plan.held)}
    show_rows(f"plan for {options.output} by {plan.mesh.world:,} ranks", rows)
    if options.json is not None:
        found = {"output": options.output, "schemes": dict(plan.schemes), "bytes_of_ranks": list(plan.held)}
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


def import_table(report: "ImportReport", options: ImportConfig, seconds: float) -> None:
    """Prints the result of an import."""
    rows = {f"modules quantized as {scheme}": count for scheme, count in report.schemes.items()}
    rows |= {
        "quantized modules without a quantizer": len(report.left),
        "weights whose bytes will not all come back": len(report.changed),
        "tensors rounded to the model's dtype": len(report.rounded),
    }
    show_rows(f"imported to {options.output}", rows)
    size = sum(file.stat().st_size for file in Path(options.output).rglob("*") if file.is_file())
    show_end(f"{options.output}: {size_text(size)}", seconds)
    print(f"next: train from it, with --load {shlex.quote(options.output)}")
