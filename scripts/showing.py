"""How commands show tables and end: within the width of a terminal, names whole, zeros left out, the next step said."""

import shlex
from collections.abc import Mapping

from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table

from amaxbridge.export.output.model_card import size_text
from amaxbridge.mappings.errors import listing

_KINDS = 16  # of unquantized matrices that are listed


def show(table: Table, console: Console | None = None) -> None:
    """Prints a table; where the terminal is too narrow for the names in it, each row under its first cell."""
    console = console or Console()
    title, table.title = table.title, None
    if title:
        console.print(title, soft_wrap=True, highlight=False)
    needed = Measurement.get(console, console.options.update(max_width=10_000), table)
    if needed.minimum <= console.width:
        console.print(table)
        return
    headers = [str(column.header) for column in table.columns]
    for name, *cells in zip(*(column.cells for column in table.columns), strict=True):
        console.print(name, soft_wrap=True, highlight=False)
        said = [f"{header}: {cell}" for header, cell in zip(headers[1:], cells, strict=True) if cell]
        console.print(Padding(", ".join(said), (0, 0, 0, 4), expand=False))


def show_rows(title: str, rows: Mapping[str, int | str], console: Console | None = None) -> None:
    """Prints what there is, and how much of it."""
    table = Table(title=title)
    table.add_column("what")
    table.add_column("how much", justify="right")
    for what, value in rows.items():
        if value:
            table.add_row(what, f"{value:,}" if isinstance(value, int) else value)
    show(table, console)


def show_unquantized(kinds: Mapping[str, int]) -> None:
    """Prints the kinds of matrices that stay unquantized, as the model card has them."""
    if kinds:
        rows = (kind if count == 1 else f"{kind} ({count:,})" for kind, count in kinds.items())
        print(f"unquantized:{listing(rows, _KINDS)}")


def show_end(what: str, seconds: float, *next_steps: list[str]) -> None:
    """Prints the last lines of a command.

    Args:
        what: what was made, and how large it is.
        seconds: how long it took.
        next_steps: command lines to type next, as words.
    """
    print(f"{what}, in {duration(seconds)}")
    for number, words in enumerate(next_steps):
        print("then: " if number else "next: ", shlex.join(words), sep="")


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 20 s` or `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size_change(before: int, after: int) -> str:
    """`72.9 kB, before 206 kB (35%)`."""
    return f"{size_text(after)}, before {size_text(before)}" + (f" ({after / before:.0%})" if before else "")
