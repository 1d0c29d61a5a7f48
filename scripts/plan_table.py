"""The plan of an export, even of 92,000 tensors, for a person to read: as a table and as JSON.

Tensors that are treated alike and differ only in the numbers of layers and experts share a row:

    model.layers.{0-93}.mlp.experts.{0-127}.gate_proj.weight    12,032    1536×4096    BF16    U8 F8_E4M3 F32    nvfp4
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from rich.table import Table

from amaxbridge.export.disk.shard_layout import DTYPE_NAMES, Layout
from amaxbridge.export.output.model_card import size_text
from amaxbridge.mappings.names import is_quantizer_state, module_of, natural_key, split_at_numbers
from amaxbridge.mappings.tensors import TensorSpec


@dataclass(slots=True)
class PlanRow:
    """Tensors that are treated alike.

    Args:
        name: name in the source, with ranges for numbers; the written name if there is no source.
        count: number of source tensors.
        shape: shape of each.
        read_as: dtype in the source; empty if there is no source.
        written_as: dtypes of the written tensors.
        scheme: name of the scheme; empty for unquantized tensors.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    read_as: str
    written_as: str
    scheme: str
    bytes_before: int = 0
    bytes_after: int = 0
    numbers: list[set[int]] = field(default_factory=list, repr=False)


def plan_rows(
    sources: Mapping[str, TensorSpec], written: Mapping[str, TensorSpec], schemes: Mapping[str, str]
) -> list[PlanRow]:
    """The rows, in natural order.

    Args:
        sources: every tensor that is read.
        written: every tensor that is written, packed experts one by one.
        schemes: quantized module → the name of its scheme.
    """
    made: dict[str, list[TensorSpec]] = {}
    for name, spec in written.items():
        made.setdefault(_source_of(name, sources, schemes), []).append(spec)
    tensors = {name: spec for name, spec in sources.items() if not is_quantizer_state(name)}
    rows: dict[tuple[Any, ...], PlanRow] = {}
    for name in sorted({**tensors, **made}, key=natural_key):
        source, after = tensors.get(name), made.get(name, [])
        shape = (source or after[0]).shape
        scheme = schemes.get(module_of(name), "") if name.endswith(".weight") else ""
        read_as = DTYPE_NAMES[source.dtype] if source else ""
        written_as = " ".join(dict.fromkeys(DTYPE_NAMES[spec.dtype] for spec in after))
        parts = split_at_numbers(name)
        key = ("{}".join(parts[::2]), shape, read_as, written_as, scheme)
        row = rows.setdefault(key, PlanRow(key[0], 0, shape, read_as, written_as, scheme))
        row.count += 1
        row.bytes_before += source.nbytes if source else 0
        row.bytes_after += sum(spec.nbytes for spec in after)
        found = [int(number) for number in parts[1::2]]
        row.numbers = [seen | {number} for seen, number in zip(row.numbers or [set()] * len(found), found, strict=True)]
    for row in rows.values():
        row.name = row.name.format(*("{" + _ranges(numbers) + "}" for numbers in row.numbers))
    return list(rows.values())


def plan_table(rows: Iterable[PlanRow]) -> Table:
    """The rows as a table."""
    table = Table()
    table.add_column("tensors")
    table.add_column("count", justify="right")
    table.add_column("shape", justify="right")
    table.add_column("read")
    table.add_column("written")
    table.add_column("scheme")
    for row in rows:
        shape = "×".join(map(str, row.shape))
        read, written = _with_size(row.read_as, row.bytes_before), _with_size(row.written_as, row.bytes_after)
        table.add_row(row.name, f"{row.count:,}", shape, read, written, row.scheme)
    return table


def _with_size(dtypes: str, nbytes: int) -> str:
    return f"{dtypes} {size_text(nbytes)}" if nbytes else dtypes


def plan_json(rows: Iterable[PlanRow], layout: Layout) -> dict[str, Any]:
    """The rows and the files, for `json.dumps`."""
    return {
        "tensors": [{key: value for key, value in asdict(row).items() if key != "numbers"} for row in rows],
        "files": [
            {"name": shard.file_name, "bytes": shard.nbytes, "tensors": len(shard.specs)} for shard in layout.shards
        ],
    }


def _source_of(name: str, sources: Mapping[str, TensorSpec], schemes: Mapping[str, str]) -> str:
    """The source of a written tensor; its own name if there is none, as for cache scales."""
    return name if name in sources or module_of(name) not in schemes else f"{module_of(name)}.weight"


def _ranges(numbers: Iterable[int]) -> str:
    """`0-2,5` for 0, 1, 2 and 5."""
    ordered = sorted(numbers)
    breaks = [0, *(at for at, (one, next_) in enumerate(pairwise(ordered), 1) if next_ != one + 1), len(ordered)]
    runs = [(ordered[begin], ordered[end - 1]) for begin, end in pairwise(breaks)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
