"""Tables of what `verify` found."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from amaxbridge.export.verify import Finding, Severity, VerifyReport

_SHOWN = 5
_COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "blue"}


def verify_tables(report: VerifyReport) -> None:
    """Prints findings, a verdict for each engine, parallel sizes, and errors against the reference."""
    console = Console()
    console.print(f"{report.directory}: {report.tensors:,} tensors, {_schemes(report)}, {report.rules} rules")
    if report.findings:
        console.print(_findings(report))
        if any(finding.mend for finding in report.findings):
            console.print(
                f"some of it can be mended: amaxbridge repair input={report.directory} output=GOOD dry_run=true"
            )
    if report.modules:
        console.print(_verdicts(report))
    if report.parallel:
        console.print(_parallel(report))
    if report.errors:
        console.print(_errors(report))
    fit = [verdict.name for verdict in report.verdicts if verdict.serves]
    where = f" in {', '.join(fit)}" if report.modules and len(fit) < len(report.verdicts) else ""
    if not report.ok and fit:
        console.print(f"[yellow]only {', '.join(fit)} reads it[/]")
    verdict = (
        f"[green]fit to serve{where}[/]" if report.ok else f"[red]not fit to serve: {len(report.failures)} rules[/]"
    )
    console.print(verdict + (f", {len(report.warnings)} warnings" if report.warnings else ""))


def _schemes(report: VerifyReport) -> str:
    found = ", ".join(f"{count:,} modules {scheme}" for scheme, count in report.schemes.items())
    return found or "nothing quantized"


def _findings(report: VerifyReport) -> Table:
    table = Table(title="findings", title_justify="left", show_lines=True)
    table.add_column("rule")
    table.add_column("what is wrong, what an engine does then, and what to do", overflow="fold")
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
    table = Table(title="engines", title_justify="left")
    for column in ("engine", "serves", "broken rules"):
        table.add_column(column, overflow="fold")
    for verdict in report.verdicts:
        rules = ", ".join(finding.rule for finding in verdict.failures)
        unknown = "" if verdict.known else "no model class of its own: as transformers names it"
        serves = "[green]yes[/]" if verdict.serves else "[red]no[/]"
        table.add_row(verdict.name, serves, "; ".join(filter(None, (rules, unknown))))
    return table


def _parallel(report: VerifyReport) -> Table:
    table = Table(title="parallel sizes of vLLM and SGLang", title_justify="left")
    for column in ("size", "serves", "what does not fit"):
        table.add_column(column, overflow="fold")
    for each in report.parallel:
        why = str(each.problems[0]) if each.problems else ""
        more = f" (and {len(each.problems) - 1} more)" if len(each.problems) > 1 else ""
        table.add_row(f"{each.axis}={each.size}", "yes" if each.serves else "[yellow]no[/]", why + more)
    return table


def _errors(report: VerifyReport) -> Table:
    table = Table(title="weights as an engine has them, against the reference", title_justify="left")
    table.add_column("projection", overflow="fold")
    table.add_column("scheme")
    for column in ("modules", "mean SNR", "worst error"):
        table.add_column(column, justify="right")
    table.add_column("of", overflow="fold")
    for each in report.projections:
        worst = each.worst
        table.add_row(
            each.projection,
            each.scheme,
            f"{each.modules:,}",
            f"{each.mean_snr:.1f} dB",
            f"{worst.error:.2%}",
            worst.module,
        )
    return table
