"""Tables of what a repair changes."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from amaxbridge.export.repair import RepairReport

_SHOWN = 20  # of one mend; the JSON has all


def repair_tables(report: RepairReport, output: str) -> None:
    """Prints every change, what is left, and what became of it."""
    console = Console()
    if report.changes:
        rows = [(each.mend, str(each)) for each in report.changes]
        console.print(_table("changes", "mend", "what becomes of what", rows))
    if report.refusals:
        rows = [(each.mend, str(each)) for each in report.refusals]
        console.print(_table("left as it is: nothing in the checkpoint says what would be right", "mend", "what", rows))
    errors = [(each.rule, str(problem)) for each in report.after.failures for problem in each.problems]
    if errors:
        console.print(_table("what verify finds even so", "rule", "what", errors))
    for line in _conclusion(report, output):
        console.print(line)


def _table(title: str, first: str, second: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column(first)
    table.add_column(second, overflow="fold")
    groups: dict[str, list[str]] = {}
    for name, text in rows:
        groups.setdefault(name, []).append(text)
    for name, texts in groups.items():
        more = len(texts) - _SHOWN
        table.add_row(name, "\n".join([*map(escape, texts[:_SHOWN]), *([f"… and {more:,} more"] if more > 0 else [])]))
    return table


def _conclusion(report: RepairReport, output: str) -> list[str]:
    moved = [each.moved for each in report.changes if each.moved is not None]
    said = []
    if moved:
        worst = max(moved, key=lambda each: each.rms)
        said.append(f"weights of {len(moved):,} modules are under a new scale: by {worst.rms:.2%} (RMS) at most")
    if not report.changes and report.ok:
        return [f"[green]nothing to repair[/]: {report.source} {'was copied' if report.written else 'stays as it is'}"]
    if report.files:
        would = "" if report.written else "would be "
        said.append(f"{would}written anew: {', '.join(report.files)}; all other files are the same, byte for byte")
    fit = "[green]fit to serve[/]" if report.ok else "[red]not fit to serve[/]"
    return [*said, f"{output if report.written else 'with these changes'}: {fit}"]
