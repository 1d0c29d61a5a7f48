"""Tables of what `verify` found."""

import shlex
from itertools import takewhile

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from amaxbridge.export.verify import Finding, Severity, VerifyReport
from amaxbridge.export.verify.verify_report import db_text
from amaxbridge.mappings.names import split_at_numbers
from amaxbridge.scripts.showing import duration, show

_SHOWN = 5
_COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "blue"}


def verify_tables(report: VerifyReport, seconds: float) -> None:
    """Prints findings, a verdict for each engine, parallel sizes, and errors against the reference."""
    console = Console()
    console.print(f"{report.directory}: {report.tensors:,} tensors, {_schemes(report)}, {report.rules} rules")
    if report.findings:
        show(_findings(report), console)
        if any(finding.mend for finding in report.findings):
            console.print(
                f"some of it can be mended: amaxbridge repair input={report.directory} output=GOOD dry_run=true"
            )
    if report.modules:
        show(_verdicts(report), console)
    if report.parallel:
        show(_parallel(report), console)
    if report.errors:
        show(_errors(report), console)
    fit = [verdict.name for verdict in report.verdicts if verdict.serves]
    where = f" in {', '.join(fit)}" if report.modules and len(fit) < len(report.verdicts) else ""
    if not report.ok and fit:
        console.print(f"[yellow]only {', '.join(fit)} reads it[/]")
    verdict = (
        f"[green]fit to serve{where}[/]" if report.ok else f"[red]not fit to serve: {len(report.failures)} rules[/]"
    )
    warned = f", {len(report.warnings)} warnings" if report.warnings else ""
    console.print(f"{verdict}{warned}, in {duration(seconds)}")
    if report.ok and report.modules and report.verdict_of("vllm").serves:
        print("next:", shlex.join(["vllm", "serve", str(report.directory)]))


def _schemes(report: VerifyReport) -> str:
    found = ", ".join(f"{count:,} modules {scheme}" for scheme, count in report.schemes.items())
    return found or "nothing quantized"


def _findings(report: VerifyReport) -> Table:
    table = Table(title="findings", show_lines=True)
    table.add_column("rule")
    table.add_column("what is wrong, what an engine does then, and what to do")
    order = list(_COLOURS)
    for finding in sorted(report.findings, key=lambda each: order.index(each.severity)):
        then, do = escape(finding.effect), escape(finding.next_step)
        mend = f"\n[dim]repair mends:[/] {finding.mend}" if finding.mend else ""
        text = f"{_problems(finding)}\n[dim]in an engine:[/] {then}\n[dim]next:[/] {do}{mend}"
        table.add_row(f"[{_COLOURS[finding.severity]}]{finding.rule}[/]", text)
    return table


def _problems(finding: Finding) -> str:
    more = len(finding.problems) - _SHOWN
    shown = [escape(str(problem)) for problem in finding.problems[:_SHOWN]]
    return "\n".join(shown + ([f"… and {more:,} more"] if more > 0 else []))


def _verdicts(report: VerifyReport) -> Table:
    table = Table(title="engines")
    for column in ("engine", "serves", "broken rules"):
        table.add_column(column)
    for verdict in report.verdicts:
        rules = ", ".join(finding.rule for finding in verdict.failures)
        unknown = "" if verdict.known else "no model class of its own: as transformers names it"
        serves = "[green]yes[/]" if verdict.serves else "[red]no[/]"
        table.add_row(verdict.name, serves, "; ".join(filter(None, (rules, unknown))))
    return table


def _parallel(report: VerifyReport) -> Table:
    table = Table(title="parallel sizes of vLLM and SGLang")
    for column in ("size", "serves", "what does not fit"):
        table.add_column(column)
    for each in report.parallel:
        why = str(each.problems[0]) if each.problems else ""
        more = f" (and {len(each.problems) - 1} more)" if len(each.problems) > 1 else ""
        table.add_row(f"{each.axis}={each.size}", "yes" if each.serves else "[yellow]no[/]", why + more)
    return table


def _errors(report: VerifyReport) -> Table:
    """One row for each projection; layer and expert of the lowest are what `*` stands for in its name."""
    parents = (each.projection.split(".")[:-1] for each in report.projections)
    shared = takewhile(lambda words: len(set(words)) == 1, zip(*parents, strict=False))
    above = ".".join(words[0] for words in shared)
    below = f", below {above}" if above else ""
    table = Table(title=f"weights as an engine has them, against the reference{below}")
    table.add_column("projection")
    table.add_column("scheme")
    for column in ("modules", "mean SNR", "lowest SNR", "at *"):
        table.add_column(column, justify="right")
    for each in report.projections:
        worst = each.worst
        table.add_row(
            each.projection[len(above) :].lstrip("."),
            each.scheme,
            f"{each.modules:,}",
            db_text(each.mean_snr),
            db_text(worst.snr),
            " ".join(split_at_numbers(worst.module)[1::2]),
        )
    return table
