"""A heat map as one small SVG: one path for each colour, with neighbouring cells of a row merged.

94 layers of 128 experts are 12,032 cells. As rectangles they would take half a megabyte for each map, as paths a fifth
of that. The SVG has no text: the labels are HTML around it, which stays readable at any width. What is drawn here is
made of numbers alone; names from the checkpoint are written by the template, which escapes them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

LEVELS = 10
_LEAST_DIFFERENCE = 0.5  # of one colour from the next: what differs by less looks alike
_LEAST_RATIO = math.log(1.1)  # the same on a logarithmic scale
_TALLEST = 480  # px, height of a map at most
_CELL = 18  # px, height of a row at most


@dataclass(frozen=True, slots=True)
class HeatMap:
    """A map, ready for the page.

    Args:
        title: what it shows.
        rows: labels of all rows, or of the first and the last.
        columns: labels of the first and the last column.
        least, greatest: the smallest and the largest value.
        ends: the values at the ends of the colour scale; None if all values have one colour.
        missing: number of cells without a value, drawn in a warning colour.
        cells: number of columns and of rows.
        paths: the picture's content, in units of cells.
        height: height of the picture, in px.
        width: largest width of the picture, in px.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, str]
    least: float
    greatest: float
    ends: tuple[float, float] | None
    missing: int
    cells: tuple[int, int]
    paths: str
    height: int
    width: int


def heat_map(
    title: str,
    cells: Mapping[tuple[int, int], float | None],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    logarithmic: bool,
    all_rows: bool = False,
) -> HeatMap | None:
    """Draws a map.

    Args:
        title: what the map shows.
        cells: (row, column) → value; None for a missing value. Cells that are not in it stay empty.
        rows: labels of the rows.
        columns: labels of the columns.
        logarithmic: True if equal ratios are equally far apart in colour, False if equal differences are.
        all_rows: True to label every row, not just the first and the last.

    Returns:
        The map; None if there are no values.
    """
    values = [value for value in cells.values() if value is not None and math.isfinite(value) and value > 0]
    if not values:
        return None
    least, greatest = min(values), max(values)
    scale, value_of, step = (math.log, math.exp, _LEAST_RATIO) if logarithmic else (float, float, _LEAST_DIFFERENCE)
    low, high = scale(least), scale(greatest)
    is_one = high - low < step
    margin = max(0.0, (LEVELS * step - (high - low)) / 2)
    low, high = low - margin, high + margin

    def level(value: float | None) -> str:
        if value is None or not (math.isfinite(value) and value > 0):
            return "none"
        share = 0.5 if is_one else (scale(value) - low) / (high - low)
        return f"l{min(int(share * LEVELS), LEVELS - 1)}"

    paths: dict[str, list[str]] = {}
    for name, row, first, count in _runs({at: level(value) for at, value in cells.items()}):
        paths.setdefault(name, []).append(f"M{first} {row}.5h{count}")
    drawn = "".join(f'<path class="{name}" d="{"".join(paths[name])}"/>' for name in sorted(paths))
    cell = max(min(_CELL, _TALLEST // len(rows)), 4)
    labels = tuple(rows) if all_rows or len(rows) < 3 else (rows[0], rows[-1])
    return HeatMap(
        title,
        labels,
        (columns[0], columns[-1]),
        least,
        greatest,
        None if is_one else (min(value_of(low), least), max(value_of(high), greatest)),
        sum(level(value) == "none" for value in cells.values()),
        (len(columns), len(rows)),
        drawn,
        cell * len(rows),
        max(40 * len(columns), 240),
    )


def _runs(levels: Mapping[tuple[int, int], str]) -> Iterator[tuple[str, int, int, int]]:
    """Runs of cells of one level in a row: level, row, first column, length."""
    begin: tuple[str, int, int, int] | None = None
    for row, column in sorted(levels):
        level = levels[row, column]
        if begin and begin[:2] == (level, row) and begin[2] + begin[3] == column:
            begin = (level, row, begin[2], begin[3] + 1)
            continue
        if begin:
            yield begin
        begin = (level, row, column, 1)
    if begin:
        yield begin
