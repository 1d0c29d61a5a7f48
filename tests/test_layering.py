"""The rooms of the design: which package may import which, read from the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FRAMEWORKS = {"megatron", "modelopt", "transformers", "hydra", "omegaconf", "compressed_tensors", "safetensors"}


def rooms(*names: str) -> set[str]:
    return {f"amaxbridge.{name}" for name in names}


FORBIDDEN = {
    "mappings": {*rooms("export", "bridge", "scripts", "configs"), "huggingface_hub", *FRAMEWORKS},
    "export": {*rooms("bridge", "scripts", "configs"), "megatron", "modelopt", "transformers", "hydra", "omegaconf"},
    "bridge": {*rooms("scripts", "configs"), "hydra", "omegaconf"},
    "configs": {*rooms("mappings", "export", "bridge", "scripts"), "torch", "megatron", "modelopt", "transformers"},
}
ONLY_IN = {  # inside bridge/, a framework has one door
    "megatron": {"bridge/megatron/"},
    "modelopt": {"bridge/megatron/"},
    "transformers": {"bridge/hf.py"},
    "torch.distributed": {
        "bridge/live/process_ranks.py",
        "bridge/stored/torch_dist.py",
        "bridge/stored/dist_metadata.py",
    },
}
FILES = [path for room in FORBIDDEN for path in sorted((ROOT / room).rglob("*.py"))]


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file, by its full dotted name."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_arrow_points_up(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    imported = imports_of(path)
    beginnings = {".".join(name.split(".")[:length]) for name in imported for length in (1, 2)}
    assert not beginnings & FORBIDDEN[room]
    assert not beginnings & set(FORBIDDEN), "a room is imported as amaxbridge.ROOM"
    for framework, doors in ONLY_IN.items():
        if any(name == framework or name.startswith(framework + ".") for name in imported):
            inside = str(path.relative_to(ROOT)).startswith(tuple(doors))
            assert inside, f"{framework} is imported outside {doors}"


def test_mappings_and_export_import_without_the_frameworks() -> None:
    """On a machine where neither Megatron nor ModelOpt is installed, both packages import."""
    packages = ["mappings.families", "export", "export.runtime", "export.schemes", "export.verify", "export.repair"]
    modules = ["export.output.finalizer", "export.disk.staging", "export.model_free.pipeline"]
    code = (
        "import importlib, sys\n"
        "for name in ('megatron', 'modelopt', 'transformers', 'hydra'): sys.modules[name] = None\n"
        f"for name in {[*packages, *modules]}: importlib.import_module(f'amaxbridge.{{name}}')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
