"""The output of the commands: tables for people, JSON for programs."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from amaxbridge.bridge.save import ExportReport
from amaxbridge.configs.schema import ExportConfig, QuantizeConfig
from amaxbridge.export.model_free.whole_directory import ModelFreeReport
from amaxbridge.mappings.errors import listing
from amaxbridge.scripts.demo_check import Findings
from amaxbridge.scripts.plan_table import plan_json, plan_rows, plan_table


def export_table(report: ExportReport, options: ExportConfig) -> None:
    """Prints the result of an export, or the plan of a dry run; with `json`, also writes it to a file."""
    _show_plan(report, report.ignored, options)
    rows: dict[str, int | str] = {
        "scheme": report.scheme,
        "Megatron parameters": sum(len(bundle.parts) for bundle in report.bundles),
        "tensors": len(report.layout.places),
        "files": len(report.layout.shards),
        "bytes before": sum(bundle.nbytes for bundle in report.bundles),
        "bytes after": report.layout.total_size,
        "modules quantized": len(report.quantized),
        "linear modules left as they are": len(report.ignored),
        "amax collected": len(report.state.amax),
        "amax filled": len(report.filled),
        "amax that differed between ranks": len(report.state.divergent),
    }
    Console().print(two_columns(f"{'plan for' if options.dry_run else 'exported'} {options.output}", rows))


def quantize_table(report: ModelFreeReport, options: QuantizeConfig) -> None:
    """Prints the result of model-free PTQ, or the plan of a dry run; with `json`, also writes it to a file."""
    _show_plan(report, report.left, options)
    rows = {
        "tensors": len(report.layout.places),
        "files": len(report.layout.shards),
        "bytes before": report.source_bytes,
        "bytes after": report.layout.total_size,
        "modules quantized": len(report.quantized),
        "2-D weights left as they are": len(report.left),
        "amax filled": len(report.filled),
        "bundles left by an interrupted run": report.resumed,
    }
    Console().print(two_columns(f"{'plan for' if options.dry_run else 'quantized'} {options.output}", rows))
    print(f"left as they are:{listing(report.left)}")


def two_columns(title: str, rows: Mapping[str, int] | Mapping[str, int | str]) -> Table:
    """What, and how much."""
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("how much", justify="right")
    for what, value in rows.items():
        table.add_row(what, f"{value:,}" if isinstance(value, int) else value)
    return table


def _show_plan(
    report: ExportReport | ModelFreeReport, left: Sequence[str], options: ExportConfig | QuantizeConfig
) -> None:
    rows = plan_rows(report.sources, report.written, report.quantized)
    if options.dry_run:  # wide in a file, so that names are not folded
        Console(width=None if sys.stdout.isatty() else 160).print(plan_table(rows))
    if options.json is not None:
        plan = {"output": options.output, **plan_json(rows, report.layout)}
        plan |= {"left_as_they_are": list(left), "amax_filled": dict(report.filled)}
        Path(options.json).write_text(json.dumps(plan, indent=2, ensure_ascii=False) + "\n")


def demo_table(results: dict[str, Any], findings: Findings) -> None:
    """Prints the demo's measurements and checks."""
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
