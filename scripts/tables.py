"""What the commands print: tables for people."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from bridge.mesh_plan import ImportPlan, MeshPlan
from bridge.save import ExportReport
from configs.schema import ExportConfig, ImportConfig, QuantizeConfig
from export.model_free import ModelFreeReport
from mappings.errors import listing
from scripts.demo_check import Findings

if TYPE_CHECKING:
    from bridge.import_hf import ImportReport  # which imports Megatron


def export_table(report: ExportReport, options: ExportConfig) -> None:
    """One screen on what was exported, or would be."""
    table = Table(title=f"{'plan for' if options.dry_run else 'exported'} {options.output}", title_justify="left")
    table.add_column("what")
    table.add_column("how much", justify="right")
    for what, value in (
        *_export_rows(report),
        ("amax collected", len(report.state.amax)),
        ("amax that differed between ranks", len(report.state.divergent)),
    ):
        table.add_row(what, f"{value:,}" if isinstance(value, int) else value)
    Console().print(table)


def _export_rows(report: ExportReport) -> list[tuple[str, int | str]]:
    shards = report.layout.shards
    return [
        ("scheme", report.scheme),
        ("Megatron parameters", sum(len(bundle.parts) for bundle in report.bundles)),
        ("fused groups", len(report.bundles)),
        ("tensors", sum(len(shard.specs) for shard in shards)),
        ("files", len(shards)),
        ("bytes before", sum(spec.nbytes for bundle in report.bundles for spec in bundle.specs.values())),
        ("bytes after", report.layout.total_size),
        ("modules quantized", len(report.quantized)),
        ("linear modules left as they are", len(report.ignored)),
    ]


def mesh_table(plan: MeshPlan, options: ExportConfig) -> None:
    """One screen on an export from a mesh that was only supposed: all of it, and what falls to the ranks."""
    mesh = plan.mesh
    sizes = f"TP={mesh.tp} PP={mesh.pp} EP={mesh.ep} ETP={mesh.etp} DP={mesh.dp}"
    table = Table(title=f"plan for {options.output} from {mesh.world:,} ranks, {sizes}", title_justify="left")
    table.add_column("what")
    table.add_column("how much", justify="right")
    for what, value in (*_export_rows(plan.export), ("amax that the checkpoint must have", len(plan.needed_amax))):
        table.add_row(what, f"{value:,}" if isinstance(value, int) else value)
    ranks = Table(title="of each rank", title_justify="left")
    for column in ("what", "least", "mean", "most"):
        ranks.add_column(column, justify="left" if column == "what" else "right")
    for what, name in (
        ("bytes of the model that it holds", "held"),
        ("fused groups that it writes", "bundles"),
        ("bytes received", "received"),
        ("bytes written", "written"),
        ("peak memory on top, bytes", "peak"),
    ):
        values = [getattr(share, name) for share in plan.shares]
        ranks.add_row(what, *(f"{value:,.0f}" for value in (min(values), sum(values) / len(values), max(values))))
    Console().print(table, ranks)


def import_plan_table(plan: ImportPlan, options: ImportConfig) -> None:
    """What an import would make."""
    table = Table(title=f"plan for {options.output} by {plan.mesh.world:,} ranks", title_justify="left")
    table.add_column("what")
    table.add_column("how much", justify="right")
    for what, value in (
        *((f"modules quantized as {scheme}", count) for scheme, count in plan.schemes.items()),
        ("bytes that a rank holds, least", min(plan.held)),
        ("bytes that a rank holds, most", max(plan.held)),
    ):
        table.add_row(what, f"{value:,}")
    Console().print(table)


def import_table(report: "ImportReport", options: ImportConfig) -> None:
    """One screen on what was imported."""
    table = Table(title=f"imported to {options.output}", title_justify="left")
    table.add_column("what")
    table.add_column("how much", justify="right")
    for what, value in (
        *((f"modules quantized as {scheme}", count) for scheme, count in report.schemes.items()),
        ("quantized modules without a quantizer", len(report.left)),
        ("weights whose bytes will not all come back", len(report.changed)),
    ):
        table.add_row(what, f"{value:,}")
    Console().print(table)


def quantize_table(report: ModelFreeReport, options: QuantizeConfig) -> None:
    """One screen on what was quantized, or would be."""
    table = Table(title=f"{'plan for' if options.dry_run else 'quantized'} {options.output}", title_justify="left")
    table.add_column("what")
    table.add_column("how much", justify="right")
    for what, value in (
        ("tensors", len(report.layout.places)),
        ("files", len(report.layout.shards)),
        ("bytes before", report.source_bytes),
        ("bytes after", report.layout.total_size),
        ("modules quantized", len(report.quantized)),
        ("2-D weights left as they are", len(report.left)),
        ("amax filled", len(report.filled)),
        ("bundles left by an interrupted run", report.resumed),
    ):
        table.add_row(what, f"{value:,}")
    Console().print(table)
    print(f"left as they are:{listing(report.left)}")


def demo_table(results: dict[str, Any], findings: Findings) -> None:
    """What the demo did and found."""
    perplexity, counts, seconds = results["perplexity"], results["counts"], results["seconds"]
    table = Table(title="held-back text: perplexity per byte", title_justify="left")
    table.add_column("model")
    table.add_column("computed by")
    table.add_column("perplexity", justify="right")
    for model, where, value in (
        ("untrained", "Megatron-Core", perplexity["untrained"]),
        (f"trained on {counts['training_bytes']:,} bytes, bf16", "Megatron-Core", perplexity["bf16"]),
        ("NVFP4 W4A4, calibrated", "Megatron-Core, fake-quantized", perplexity["nvfp4_ptq"]),
        ("NVFP4 W4A4, after QAT", "Megatron-Core, fake-quantized", perplexity["nvfp4_qat"]),
        ("NVFP4 W4A4, exported", "transformers, compressed-tensors", findings.perplexity),
    ):
        table.add_row(model, where, f"{value:.3f}")
    checks = Table(title="the exported checkpoint against the trained model", title_justify="left")
    checks.add_column("check")
    checks.add_column("found", justify="right")
    for check, found in (
        ("keys missing, unexpected or mismatched in transformers", str(len(findings.key_problems))),
        ("fused groups with different scales", str(len(findings.unshared_scales))),
        ("perplexity: transformers against Megatron", f"{findings.perplexity / perplexity['nvfp4_qat'] - 1:+.2%}"),
        ("logits: transformers against Megatron, NVFP4", f"{findings.nvfp4_error:.2%}"),
        ("logits: transformers against Megatron, not quantized", f"{findings.plain_error:.2%}"),
        ("logits: NVFP4 against not quantized", f"{findings.quantization_error:.2%}"),
    ):
        checks.add_row(check, found)
    console = Console()
    console.print(table, checks)
    console.print(
        f"{counts['parameters']:,} parameters on {results['parallel']['tp']} tensor-parallel ranks; "
        f"training {seconds['training']:.0f} s, QAT {seconds['qat']:.0f} s"
    )
