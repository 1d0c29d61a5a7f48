"""The options of an export: declared once, the same on the command line, in Python and in the documentation."""

import dataclasses
import inspect
import subprocess
import sys
from typing import Any, get_type_hints

import pytest
from omegaconf import OmegaConf

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.configs.options import options_of
from amaxbridge.configs.schema import ExportConfig, QuantizeConfig, RepairConfig
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.output_options import (
    COMMAND_LINE,
    MEANING,
    OutputKeywords,
    OutputOptions,
    RepairKeywords,
    RepairOptions,
    SaveKeywords,
    SaveOptions,
)
from tests.support.paths import ROOT

OPTIONS = dataclasses.fields(SaveOptions)
PAGE = ROOT / "docs" / "after-training.md"


def test_the_keywords_are_the_options() -> None:
    """TypedDicts say to type checkers what the dataclasses declare: the same names and types."""
    declared = {each.name: each.type for each in OPTIONS}
    common = {each.name for each in dataclasses.fields(OutputOptions)}
    assert len(declared) == 21
    assert SaveKeywords.__annotations__.keys() == declared.keys()
    assert OutputKeywords.__annotations__.keys() == common - {"scheme", "ignore"}
    for name, kind in SaveKeywords.__annotations__.items():
        assert getattr(kind, "__forward_arg__", kind) == declared[name], name
    assert get_type_hints(OutputOptions, {"Progress": object, "Recipe": object})["overwrite"] is bool


def test_a_repair_has_those_of_an_export_and_its_own() -> None:
    declared = {each.name: each for each in dataclasses.fields(RepairOptions)}
    assert RepairKeywords.__annotations__.keys() == declared.keys()
    shared = {each.name: each for each in dataclasses.fields(OutputOptions) if each.name in declared}
    assert len(shared) == 6 and declared.keys() - shared.keys() == {"unseen", "copy"}
    assert all(each.default == declared[name].default for name, each in shared.items())
    on_command_line: dict[str, Any] = dict(options_of(RepairConfig))
    for each in declared.values():
        name = each.metadata[COMMAND_LINE]
        assert name is None or on_command_line[name].metadata[MEANING] == each.metadata[MEANING]


def test_python_takes_the_options_of_the_command_line() -> None:
    for function in (AutoBridge.save_hf_pretrained, AutoBridge.convert_checkpoint, model_free_ptq):
        assert "options" in inspect.signature(function).parameters
    for schema, kind in ((ExportConfig, SaveOptions), (QuantizeConfig, OutputOptions)):
        on_command_line: dict[str, Any] = dict(options_of(schema))
        defaults = OmegaConf.structured(schema)
        seen = 0
        for each in dataclasses.fields(kind):
            name = each.metadata[COMMAND_LINE]
            if name is None or each.name == "max_shard_bytes":  # in other units
                continue
            seen += 1
            assert on_command_line[name].metadata[MEANING] == each.metadata[MEANING]
            if each.name not in ("scheme", "ignore"):
                assert OmegaConf.select(defaults, name) == each.default
        assert seen == (18 if kind is SaveOptions else 11)
    assert SaveOptions().max_shard_bytes == ExportConfig.__dataclass_fields__["io"].default_factory().max_shard_gb * 1e9


def test_options_are_frozen_and_unknown_ones_refused() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SaveOptions().verify = False  # type: ignore[misc]
    with pytest.raises(TypeError, match="overwrit"):
        SaveOptions(overwrit=True)  # type: ignore[call-arg]


def test_the_documentation_has_every_option() -> None:
    """Its table is made of the declarations: `python -m tests.configs.test_output_options` prints it."""
    assert table() in PAGE.read_text()


def test_the_declarations_wait_for_nothing() -> None:
    code = "import sys, amaxbridge.output_options; assert not {'torch', 'omegaconf', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def table() -> str:
    """The options as Markdown: in Python, on the command line, default, meaning."""
    rows = ["| Python | command line | default | meaning |", "|---|---|---|---|"]
    for each in OPTIONS:
        command_line = f"`{each.metadata[COMMAND_LINE]}`" if each.metadata[COMMAND_LINE] else ""
        rows.append(f"| `{each.name}` | {command_line} | `{each.default!r}` | {each.metadata[MEANING]} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
