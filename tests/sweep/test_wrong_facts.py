"""A wrong fact in the table of architectures is seen: by an oracle of the sweep, or by what refuses to write."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from amaxbridge.export.architectures import facts
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.mappings.errors import AmaxbridgeError
from tests.sweep.architectures import MODULES, PUBLISHED, SQUARE, rows
from tests.sweep.file_oracle import BOUNDS
from tests.sweep.judge_row import Case

pytestmark = pytest.mark.slow

SCHEME = "fp8_dynamic"
Table = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Mutation:
    """A wrong fact.

    Args:
        model_type: a type whose table has the fact.
        layout: files in which it matters.
        change: makes the fact wrong.
        seen: a pattern of what is said: kinds of the oracle's faults, or a refusal.
    """

    model_type: str
    layout: str
    change: Callable[[Table], None]
    seen: str


def _entry(role: str, name: str, **changed: Any) -> Callable[[Table], None]:
    """Changes an entry; None removes a field."""

    def change(table: Table) -> None:
        entry = table[role][name]
        entry |= changed
        for key in [key for key, value in entry.items() if value is None]:
            del entry[key]

    return change


def _role(name: str, role: str, other: str) -> Callable[[Table], None]:
    """Says that a tensor has another role."""

    def change(table: Table) -> None:
        table.setdefault(other, {})[name] = table[role].pop(name)

    return change


def _without(field: str, name: str, left: Any = None) -> Callable[[Table], None]:
    def change(table: Table) -> None:
        del table[field][name]
        if left is not None:
            table[field][name] = left

    return change


def _no_head(table: Table) -> None:
    table["output"]["module"] = None


def _tower_is_linear(table: Table) -> None:
    del table["towers"]["vision_tower."]
    table["linear"]["vision_tower.vision_model.encoder.layers.*.self_attn.q_proj.weight"] = {}


def _as_many_as_are_routed_to(table: Table) -> None:
    for part in ("gate_proj", "up_proj"):
        del table["linear"][f"{ROUTED}*.{part}.weight"]["numbers"]


ROUTED = "model.layers.*.mlp.experts."
MUTATIONS = {
    "inputs first taken for outputs first": Mutation(
        "llama4_text", SQUARE, _entry("experts", "model.layers.*.feed_forward.experts.gate_up_proj", inputs_first=None),
        "rows are no rows of the model",
    ),
    "outputs first taken for inputs first": Mutation(
        "granitemoe", SQUARE,
        _entry("experts", "model.layers.*.block_sparse_moe.input_linear.weight", inputs_first=True),
        "rows are no rows of the model",
    ),
    "up before gate": Mutation(
        "qwen3_moe", MODULES, _entry("experts", f"{ROUTED}gate_up_proj", holds=["up_proj", "gate_proj"]),
        "gate, up and down exchanged",
    ),
    "alternating rows taken for halves": Mutation(
        "gpt_oss", PUBLISHED, _entry("experts", f"{ROUTED}gate_up_proj", interleaved=None),
        "new name for several matrices",
    ),
    "router taken for a linear": Mutation(
        "qwen3_moe", PUBLISHED, _role("model.layers.*.mlp.gate.weight", "router", "linear"), "raw quantized"
    ),
    "indexer taken for a linear": Mutation(
        "deepseek_v32", PUBLISHED, _role("model.layers.*.self_attn.indexer.wk.weight", "indexer", "linear"),
        "indexer quantized",
    ),
    "embedding taken for a linear": Mutation(
        "t5", PUBLISHED, _role("shared.weight", "embedding", "linear"), "embedding quantized"
    ),
    "linear taken for a router": Mutation(
        "llama", PUBLISHED, _role("model.layers.*.mlp.down_proj.weight", "linear", "router"), "nothing of down_proj"
    ),
    "head not known": Mutation("gemma2", PUBLISHED, _no_head, "head targeted in transformers' tree, and unquantized"),
    "size that another field has": Mutation(
        "llama", PUBLISHED,
        _entry("linear", "model.layers.*.mlp.up_proj.weight", shape=["hidden_size", "intermediate_size"]),
        "config.json says hidden_size = 64",
    ),
    "tower taken for a part of the language model": Mutation(
        "llava", PUBLISHED, _tower_is_linear, "tensors are not known|tower or projector quantized"
    ),
    "modules of a tower spelled as files are": Mutation(
        "llava", PUBLISHED, _without("towers", "vision_tower.", {}), "tower or projector targeted in transformers' tree"
    ),
    "number of experts in files": Mutation(
        "longcat_flash", PUBLISHED, _as_many_as_are_routed_to, "is one more than the 4"
    ),
    "experts that cannot be taken apart": Mutation(
        "gpt_oss", PUBLISHED, _role(f"{ROUTED}down_proj", "experts", "opaque"), "not taken apart"
    ),
}  # fmt: skip


@cache
def case_of(model_type: str, *, square: bool) -> Case:
    """A model of a type, which several mutations share."""
    (row, *_) = rows([model_type])
    return Case(row, square=square)


def judged(mutation: Mutation, directory: Path) -> str:
    """What quantizing a model and the oracles say; nothing if all is right."""
    case = case_of(mutation.model_type, square=mutation.layout == SQUARE)
    case.save(directory / "source", mutation.layout)
    try:
        model_free_ptq(directory / "source", directory / "out", SCHEME)
    except AmaxbridgeError as error:
        return str(error)
    findings, _ = case.judge_files(directory / "source", directory / "out", BOUNDS[SCHEME])
    missed = {
        f"nothing of {each.name.rpartition('.')[2]}"
        for number, each in enumerate(case.truth)
        if not each.stays and number not in findings.quantized
    }
    return "\n".join([*(f"{kind}: {example}" for kind, example in findings.wrong), *sorted(missed)])


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_fact_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation, read, changed = MUTATIONS[name], facts._table, []

    def mutated(architecture: str, model_type: str) -> Any:
        table = copy.deepcopy(read(architecture, model_type))
        if table is not None:
            mutation.change(table)
            changed.append(architecture)
        return table

    with monkeypatch.context() as patched:
        patched.setattr(facts, "_table", mutated)
        said = judged(mutation, tmp_path / "wrong")
    assert changed and re.search(mutation.seen, said), said


@pytest.mark.parametrize(
    ("model_type", "layout"), sorted({(each.model_type, each.layout) for each in MUTATIONS.values()})
)
def test_nothing_is_said_of_the_table_as_it_is(model_type: str, layout: str, tmp_path: Path) -> None:
    said = judged(Mutation(model_type, layout, lambda table: None, ""), tmp_path)
    assert not any(re.search(each.seen, said) for each in MUTATIONS.values()), said
