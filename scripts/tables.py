"""What the commands print: tables for people."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bridge.auto import ExportReport
from configs.schema import ExportConfig
from scripts.demo_check import Findings


def export_table(report: ExportReport, options: ExportConfig) -> None:
    """One screen on what was exported, or would be."""
    table = Table(title=f"{'plan for' if options.dry_run else 'exported'} {options.output}", title_justify="left")
    table.add_column("what")
    table.add_column("how much", justify="right")
    shards = report.layout.shards
    for what, value in (
        ("scheme", report.scheme),
        ("Megatron parameters", len(report.bundles)),
        ("tensors", sum(len(shard.specs) for shard in shards)),
        ("files", len(shards)),
        ("bytes before", sum(spec.nbytes for bundle in report.bundles for spec in bundle.tensors.values())),
        ("bytes after", report.layout.total_size),
        ("modules quantized", len(report.quantized)),
        ("linear modules left as they are", len(report.ignored)),
        ("amax collected", len(report.state.amax)),
        ("amax that differed between ranks", len(report.state.divergent)),
    ):
        table.add_row(what, f"{value:,}" if isinstance(value, int) else value)
    Console().print(table)


def demo_table(results: dict[str, Any], findings: Findings, output: Path) -> None:
    """What the demo did and found."""
    perplexity = results["perplexity"]
    table = Table(title="from Megatron-Core to a served checkpoint", title_justify="left")
    table.add_column("step")
    table.add_column("where")
    table.add_column("perplexity", justify="right")
    for step, where, value in (
        ("untrained", "Megatron", perplexity["untrained"]),
        ("trained, bf16", "Megatron", perplexity["bf16"]),
        ("NVFP4 W4A4, calibrated", "Megatron, fake-quantized", perplexity["nvfp4_ptq"]),
        ("NVFP4 W4A4, after QAT", "Megatron, fake-quantized", perplexity["nvfp4_qat"]),
        ("NVFP4 W4A4, exported", "transformers, compressed-tensors", findings.perplexity),
    ):
        table.add_row(step, where, f"{value:.3f}")
    console = Console()
    console.print(table)
