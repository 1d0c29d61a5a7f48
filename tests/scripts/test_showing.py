"""What commands print: within 80 columns, names whole, zeros left out, and what to do next."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from amaxbridge.scripts.showing import duration, show, show_rows
from tests.support.paths import ENVIRONMENT

LONG = "model.language_model.layers.{0-93}.mlp.experts.{0-127}.gate_proj.weight"


def printed(table: Table, width: int) -> list[str]:
    screen = io.StringIO()
    show(table, Console(file=screen, width=width))
    return [line.rstrip() for line in screen.getvalue().splitlines()]


def table_of(*names: str) -> Table:
    table = Table(title="a plan")
    for column in ("tensors", "count", "written", "scheme"):
        table.add_column(column)
    for name in names:
        table.add_row(name, "12,032", "U8 F8_E4M3 F32 6.92 kB", "")
    return table


def test_a_table_that_fits_is_a_table() -> None:
    lines = printed(table_of("lm_head", "norm"), 80)
    assert lines[0] == "a plan" and len(lines) == 7
    assert all(len(line) <= 80 for line in lines)


def test_long_names_stay_whole() -> None:
    lines = printed(table_of(LONG, "lm_head"), 80)
    assert lines == [
        "a plan", LONG, "    count: 12,032, written: U8 F8_E4M3 F32 6.92 kB",
        "lm_head", "    count: 12,032, written: U8 F8_E4M3 F32 6.92 kB",
    ]  # fmt: skip
    assert LONG in "\n".join(printed(table_of(LONG), 160))


def test_zeros_are_left_out() -> None:
    screen = io.StringIO()
    show_rows("done", {"files": 3, "amax filled": 0, "scheme": "fp8", "note": ""}, Console(file=screen, width=80))
    assert "files" in screen.getvalue() and "fp8" in screen.getvalue()
    assert "amax filled" not in screen.getvalue() and "note" not in screen.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_commands_end_with_time_size_and_the_next_step(qwen3_moe: Path, tmp_path: Path) -> None:
    """Console, card and report name the same unquantized matrices; nothing is wider than 80 columns."""

    def amaxbridge(*words: str) -> list[str]:
        command = [sys.executable, "-m", "amaxbridge", *words]
        environment = {**os.environ, **ENVIRONMENT, "COLUMNS": "80"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
        lines = done.stdout.splitlines()
        assert [line for line in lines if len(line) > 80 and str(qwen3_moe) not in line and "file:" not in line] == []
        return lines

    plan = amaxbridge("quantize", f"input={qwen3_moe}", "output=out", "dry_run=true")
    assert "model.layers.{0-1}.mlp.experts.{0-7}.gate_proj.weight" in plan
    lines = amaxbridge("quantize", f"input={qwen3_moe}", "output=out")
    kinds = ["lm_head", "model.embed_tokens", "model.layers.*.mlp.gate (2)"]
    at = lines.index("unquantized:")
    assert lines[at + 1 : at + 4] == [f"  {kind}" for kind in kinds]
    assert lines[at + 4].startswith("out: ") and lines[at + 4].endswith(" s")
    assert lines[at + 5 :] == [f"next: amaxbridge verify input=out reference={qwen3_moe}", "then: vllm serve out"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| unquantized | `lm_head`, `model.embed_tokens`, `model.layers.*.mlp.gate` (2) |" in card
    checked = amaxbridge("verify", "input=out", f"reference={qwen3_moe}")
    assert checked[-1] == "next: vllm serve out"
    amaxbridge("report", "input=out", f"reference={qwen3_moe}")
    left = json.loads((tmp_path / "out" / "report.json").read_text())["left"]
    assert left == {"lm_head": 1, "model.embed_tokens": 1, "model.layers.*.mlp.gate": 2}
