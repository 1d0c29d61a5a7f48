"""The HTML page and the JSON beside it. The page is self-contained: no script, no font, no URL."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from amaxbridge.export.output.model_card import size_text
from amaxbridge.export.report.facts import Facts, Json, ModuleFacts, rows_of
from amaxbridge.export.report.heatmap import LEVELS, HeatMap, heat_map
from amaxbridge.export.verify.reference_weights import ErrorSummary
from amaxbridge.export.verify.verify_report import db_text, finite_or_none
from amaxbridge.mappings.extras import need

if TYPE_CHECKING:
    from markupsafe import Markup

_SHOWN = 12  # rows that a table shows; the JSON has all
_FEW = 3  # problems of one kind that are shown
_FAR = 8  # outlying experts that are shown


@dataclass(frozen=True, slots=True)
class FarExpert:
    """An expert whose amax is far from the others of its layer: `factor` times their median."""

    module: str
    what: str
    amax: float
    factor: float


def render(facts: Facts) -> str:
    """Returns the HTML page.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    need("The page of a report", "jinja2")
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("amaxbridge.export.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": size_text,
        "count": "{:,}".format,
        "db": db_text,
        "number": "{:.4g}".format,
        "breakable": _breakable,
    }
    return environment.get_template("page.html.jinja").render(
        facts=facts,
        snr=errors_by_projection(facts),
        snr_map=_by_layer("mean SNR in dB", facts.modules, lambda module: module.snr, _mean, logarithmic=False),
        amax_maps=_amax_maps(facts.modules),
        expert_maps=_expert_maps(facts.modules),
        far=far_experts(facts.modules),
        schemes=_counts(module.scheme for module in facts.modules),
        amax=_amax_notes(facts),
        levels=range(LEVELS),
        shown=_SHOWN,
        few=_FEW,
    )


def report_json(facts: Facts) -> Json:
    """Returns all facts for programs; numbers that JSON cannot represent are null."""
    return {
        "directory": facts.directory,
        "architectures": facts.config.get("architectures"),
        "conversion": facts.conversion,
        "bytes": {"before": facts.before, "after": facts.after},
        "parts": [{"part": part.part, "before": part.before, "after": part.after} for part in facts.parts],
        "schemes": _counts(module.scheme for module in facts.modules),
        "left": facts.left,
        "snr": [
            {"projection": each.projection, "scheme": each.scheme, "modules": each.modules,
             "mean_db": finite_or_none(each.mean_snr), "worst_db": finite_or_none(each.worst.snr),
             "worst_module": each.worst.module}
            for each in errors_by_projection(facts)
        ],
        "serving": facts.serving.as_json() | {"directory": facts.directory},
        "saturated": [module.name for module in facts.saturated],
        "amax": _amax_notes(facts),
        "modules": list(rows_of(facts)),
    }  # fmt: skip


def errors_by_projection(facts: Facts) -> list[ErrorSummary]:
    """One row for each measured projection, as `verify` has them, worst first."""
    return sorted(facts.serving.projections, key=lambda row: row.worst.snr)


def far_experts(modules: Iterable[ModuleFacts]) -> list[FarExpert]:
    """The experts whose amax are furthest from the median of their layer, in either direction."""
    routed = [module for module in modules if module.place.expert is not None]
    found = []
    for what, amax in _KINDS.items():
        ordered = sorted(routed, key=lambda module: (module.place.projection, module.place.layer or 0))
        for _, group in groupby(ordered, lambda module: (module.place.projection, module.place.layer)):
            values = [(module, value) for module in group if _is_usable(value := amax(module) or 0.0)]
            if values:
                median = statistics.median(value for _, value in values)
                found += [FarExpert(module.name, what, value, value / median) for module, value in values]
    return sorted(found, key=lambda each: -abs(math.log(each.factor)))[:_FAR]


_KINDS: Mapping[str, Callable[[ModuleFacts], float | None]] = {
    "weight": lambda module: module.weight_amax,
    "input": lambda module: module.input_amax,
}


def _amax_maps(modules: Sequence[ModuleFacts]) -> list[HeatMap]:
    """Maps of layer by projection, for weights and inputs; for experts the largest value."""
    maps = (_by_layer(f"amax of the {what}s", modules, amax, max, logarithmic=True) for what, amax in _KINDS.items())
    return [each for each in maps if each is not None]


def _by_layer(
    title: str,
    modules: Iterable[ModuleFacts],
    value: Callable[[ModuleFacts], float | None],
    combine: Callable[[list[float]], float],
    *,
    logarithmic: bool,
) -> HeatMap | None:
    """A row for each projection, a column for each layer."""
    found: dict[tuple[str, int], list[float]] = {}
    for module in modules:
        number = value(module)
        if number is not None and math.isfinite(number) and module.place.layer is not None:
            found.setdefault((module.place.projection, module.place.layer), []).append(number)
    projections = list(dict.fromkeys(projection for projection, _ in found))
    layers = sorted({layer for _, layer in found})
    if not layers:
        return None
    columns = _span(layers)
    row = {projection: number for number, projection in enumerate(projections)}
    column = {layer: number for number, layer in enumerate(columns)}
    cells: dict[tuple[int, int], float | None] = {
        (row[projection], column[layer]): combine(numbers) for (projection, layer), numbers in found.items()
    }
    names = [f"layer {number}" for number in columns]
    return heat_map(title, cells, list(map(_label, projections)), names, logarithmic=logarithmic, all_rows=True)


def _expert_maps(modules: Iterable[ModuleFacts]) -> list[HeatMap]:
    """Maps of layer by expert for each projection; projections with equal amax share a map."""
    routed = [module for module in modules if module.place.expert is not None]
    layers = sorted({module.place.layer or 0 for module in routed})
    experts = _span([0, *sorted({module.place.expert or 0 for module in routed})])
    column = {expert: number for number, expert in enumerate(experts)}
    row = {layer: number for number, layer in enumerate(layers)}
    maps = []
    for what, amax in _KINDS.items():
        by_projection: dict[str, dict[tuple[int, int], float | None]] = {}
        for module in routed:
            cells = by_projection.setdefault(module.place.short, {})
            cells[row[module.place.layer or 0], column[module.place.expert or 0]] = amax(module)
        together: list[tuple[list[str], dict[tuple[int, int], float | None]]] = []
        for projection, cells in by_projection.items():
            same = next((names for names, others in together if others == cells), None)
            if same is None:
                together.append(([projection], cells))
            else:
                same.append(projection)
        for names, cells in together:
            title = f"{what} amax of {', '.join(names)}"
            rows, columns = [f"layer {layer}" for layer in layers], [f"expert {number}" for number in experts]
            maps.append(heat_map(title, cells, rows, columns, logarithmic=True))
    return [each for each in maps if each is not None]


def _span(numbers: Sequence[int]) -> Sequence[int]:
    """The numbers from the first to the last of a sorted list; the numbers alone if these are few among them."""
    every = range(numbers[0], numbers[-1] + 1)
    return every if numbers[-1] - numbers[0] <= 2 * len(numbers) + 64 else sorted(set(numbers))


def _amax_notes(facts: Facts) -> Json:
    """Amax that differed between ranks, were missing or were filled, from the export's record or from the state."""
    noted: Json = facts.conversion.get("amax") or {}
    state = facts.state
    divergent: dict[str, Sequence[float]] = noted.get("divergent") or (dict(state.divergent) if state else {})
    filled: dict[str, str] = noted.get("filled") or {}
    missing = noted.get("missing") or (sorted(state.missing) if state else [])
    rows = [
        (name, least, greatest, greatest / least if least else math.inf)
        for name, (least, greatest) in divergent.items()
    ]
    return {
        "known": bool(noted or state),
        "collected": noted.get("collected", len(state.amax) if state else 0),
        "divergent": [
            {"name": name, "least": least, "greatest": greatest, "ratio": finite_or_none(ratio)}
            for name, least, greatest, ratio in sorted(rows, key=lambda row: -row[3])
        ],
        "missing": [{"name": name, "filled": filled.get(name)} for name in sorted({*missing, *filled})],
    }


def _label(projection: str) -> str:
    """A projection's shortest distinct label: `experts gate_proj`."""
    words = [
        word for word in projection.split(".") if word not in ("*", "mlp", "mixer", "self_attn", "block_sparse_moe")
    ]
    return " ".join(words)


def _counts(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.inf


def _breakable(name: str) -> "Markup":
    """A module's name that may wrap after each dot."""
    from markupsafe import Markup

    return Markup(".<wbr>").join(name.split("."))


def _is_usable(amax: float) -> bool:
    return 0 < amax < math.inf
