"""Packages that only some commands need: one error names the extra, and guards every import of them."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from amaxbridge.mappings.extras import EXTRAS, MissingExtraError, need
from tests.support.paths import ENVIRONMENT, ROOT

ROOMS = ("amaxbridge", "mappings", "export", "bridge", "scripts", "configs")
BEHIND = {  # where what an extra brings is imported → what asks for it first
    "bridge/megatron/": "bridge/megatron/__init__.py",
    "bridge/hf.py": "bridge/hf.py",
    "export/report/html_page.py": "export/report/html_page.py",
    "export/model_free/converters/chain.py": "export/model_free/converters/chain.py",
    "scripts/demo_": "scripts/demo.py",
}
HIDE = "import sys; sys.modules.update(dict.fromkeys({!r}))\n"
OPTIONAL = {module.partition(".")[0] for modules in EXTRAS.values() for module in modules} | {"safetensors"}


def imports_at_run_time(path: Path) -> set[str]:
    """The packages that a file imports, without what only type checkers see."""
    tree = ast.parse(path.read_text())
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_every_import_is_behind_the_question() -> None:
    seen = set[str]()
    for path in (each for room in ROOMS for each in (ROOT / room).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if imports_at_run_time(path) & OPTIONAL:
            doors = [door for door in BEHIND if name.startswith(door)]
            assert doors, f"{name} imports {imports_at_run_time(path) & OPTIONAL}, which an extra installs"
            seen.update(doors)
    assert seen == BEHIND.keys()
    for asking in BEHIND.values():
        assert re.search(r"\bneed\(|\binstalled\(", (ROOT / asking).read_text()), asking


def test_extras_are_those_of_the_distribution() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    of_module = packages_distributions()
    for extra, modules in EXTRAS.items():
        named = {re.split(r"[>=<]", requirement)[0].lower().replace("_", "-") for requirement in declared[extra]}
        for module in set(modules) - {"tokenizers"}:  # comes with transformers
            distributions = {each.lower().replace("_", "-") for each in of_module[module.partition(".")[0]]}
            assert distributions & named, f"{module} is not among [{extra}]"


def test_all_that_is_absent_is_named_at_once() -> None:
    with pytest.raises(MissingExtraError) as raised:
        need("This test", "torch", "no_such_module.core", "transformers")
    assert str(raised.value).startswith("This test needs no_such_module.core, not installed here")


ASKED_FOR = ("bridge/megatron/", "bridge/import_hf.py", "scripts/demo_text.py", "scripts/demo_training.py")
"""Modules that need an extra to be imported at all; what imports them has asked."""


def test_everything_else_is_imported_without_them() -> None:
    """Every module imports, one after the other, in one process."""
    files = [path.relative_to(ROOT) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    names = [".".join(path.with_suffix("").parts) for path in files if not str(path).startswith(ASKED_FOR)]
    modules = [f"amaxbridge.{name}" for name in names if not name.startswith("amaxbridge") and "__init__" not in name]
    assert len(modules) > 100
    lines = ["from importlib import import_module", f"for name in {modules!r}: import_module(name)"]
    program = HIDE.format(sorted(OPTIONAL)) + "\n".join(lines)
    ran = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


WITHOUT = {  # a program → what it says in an environment with core dependencies only
    "from amaxbridge.bridge import megatron": (
        "A model in Megatron needs megatron.core, modelopt, transformers, tokenizers, einops, requests, not installed "
        "here: pip install 'amaxbridge[megatron]'"
    ),
    "from amaxbridge.export.model_free.converters.chain import ConverterChain\n"
    "ConverterChain([]).quantization({'config_groups': {'group_0': {'weights': {'num_bits': 8}}}})": (
        "A converter after compressed-tensors needs compressed_tensors, not installed here: "
        "pip install 'amaxbridge[convert]'"
    ),
    "from amaxbridge.export.report import render; render(None)": (
        "The page of a report needs jinja2, not installed here: pip install 'amaxbridge[report]'"
    ),
    "from amaxbridge.bridge.hf import make_hf_model; from amaxbridge.mappings.families.qwen3 import QWEN3; "
    "make_hf_model(QWEN3, {}, None)": (
        "A config.json made of saved arguments needs transformers, not installed here: "
        "pip install 'amaxbridge[megatron]'"
    ),
}


def test_one_error_names_the_extra() -> None:
    """One process tries all extras, because importing torch takes seconds."""
    hidden = sorted(OPTIONAL)
    lines = [
        "from amaxbridge.mappings.errors import UsageError",
        f"for program in {list(WITHOUT)!r}:",
        "    try: exec(program)",
        "    except UsageError as error: print(error)",
    ]
    ran = subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden) + "\n".join(lines)],
        env=ENVIRONMENT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert ran.stdout.splitlines() == list(WITHOUT.values())
