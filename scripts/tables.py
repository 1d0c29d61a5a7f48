"""The output of the commands: tables for people, JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from amaxbridge.configs.schema import ExportConfig, QuantizeConfig
from amaxbridge.export.model_free.whole_directory import ModelFreeReport
from amaxbridge.export.output.model_card import size_text
from amaxbridge.export.output.module_schemes import unquantized_kinds
from amaxbridge.scripts.plan_table import plan_json, plan_rows, plan_table
from amaxbridge.scripts.showing import show, show_end, show_rows, show_unquantized, size_change

if TYPE_CHECKING:
    from amaxbridge.bridge.save import ExportReport
    from amaxbridge.scripts.demo_check import Findings


def export_table(report: "ExportReport", options: ExportConfig, seconds: float) -> None:
    """Prints the result of an export, or the plan of a dry run; with `json`, also writes it to a file."""
    _show_plan(report, report.ignored, options)
    if options.adapter.mode == "only":
        _show_adapters(report, options, seconds)
        return
    before = sum(bundle.nbytes for bundle in report.bundles)
    rows: dict[str, int | str] = {
        "scheme": report.scheme,
        "Megatron parameters": sum(len(bundle.parts) for bundle in report.bundles),
        **_written(report, before),
        "amax collected": len(report.state.amax),
        "amax filled": len(report.filled),
        "amax that differed between ranks": len(report.state.divergent),
    }
    _show_result(report, options, rows, "exported", seconds)


def _show_adapters(report: "ExportReport", options: ExportConfig, seconds: float) -> None:
    """Prints the result of `adapter=only`, or its plan: the directory is for PEFT, and `verify` has no rules for it."""
    rows = {"tensors": len(report.layout.places), "files": len(report.layout.shards)}
    show_rows(f"{'plan for' if options.dry_run else 'exported'} {options.output}, adapters alone", rows)
    would = " would have" if options.dry_run else ":"
    show_end(f"{options.output}{would} {size_text(report.layout.total_size)}", seconds)


def quantize_table(report: ModelFreeReport, options: QuantizeConfig, seconds: float) -> None:
    """Prints the result of model-free PTQ, or the plan of a dry run; with `json`, also writes it to a file."""
    _show_plan(report, report.left, options)
    rows: dict[str, int | str] = {
        **_written(report, report.source_bytes),
        "amax filled": len(report.filled),
        "bundles left by an interrupted run": report.resumed,
    }
    _show_result(report, options, rows, "quantized", seconds, f"reference={options.input}")


def _written(report: "ExportReport | ModelFreeReport", before: int) -> dict[str, int | str]:
    return {
        "tensors": len(report.layout.places),
        "files": len(report.layout.shards),
        "size": size_change(before, report.layout.total_size),
        "modules quantized": len(report.quantized),
    }


def _show_result(
    report: "ExportReport | ModelFreeReport",
    options: ExportConfig | QuantizeConfig,
    rows: Mapping[str, int | str],
    done: str,
    seconds: float,
    *to_verify: str,
) -> None:
    specs = {name: spec for shard in report.layout.shards for name, spec in shard.specs.items()}
    show_rows(f"{'plan for' if options.dry_run else done} {options.output}", rows)
    show_unquantized(unquantized_kinds(specs, report.quantized))
    size = size_text(report.layout.total_size)
    if options.dry_run:
        show_end(f"{options.output} would have {size}", seconds)
        print("next: the same without dry_run=true")
        return
    verify = ["amaxbridge", "verify", f"input={options.output}", *to_verify]
    show_end(f"{options.output}: {size}", seconds, verify, ["vllm", "serve", options.output])


def _show_plan(
    report: "ExportReport | ModelFreeReport", left: Sequence[str], options: ExportConfig | QuantizeConfig
) -> None:
    rows = plan_rows(report.sources, report.written, report.quantized)
    if options.dry_run:
        show(plan_table(rows))
    if options.json is not None:
        plan = {"output": options.output, **plan_json(rows, report.layout)}
        plan |= {"left_as_they_are": list(left), "amax_filled": dict(report.filled)}
        Path(options.json).write_text(json.dumps(plan, indent=2, ensure_ascii=False) + "\n")


def demo_table(results: dict[str, Any], findings: "Findings") -> None:
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
