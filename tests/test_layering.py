"""The rooms and who may call whom: the arrows of the design, read from the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FRAMEWORKS = {"megatron", "modelopt", "transformers", "hydra", "omegaconf", "compressed_tensors", "safetensors"}

FORBIDDEN = {
    "mappings": {"export", "bridge", "scripts", "configs", "huggingface_hub", *FRAMEWORKS},
    "export": {"bridge", "scripts", "configs", "megatron", "modelopt", "transformers", "hydra", "omegaconf"},
    "bridge": {"scripts", "configs", "hydra", "omegaconf"},
    "configs": {"mappings", "export", "bridge", "scripts", "torch", "megatron", "modelopt", "transformers"},
}
ONLY_IN = {  # inside bridge/, a framework has one door
    "megatron": {"bridge/megatron/"},
    "modelopt": {"bridge/megatron/", "bridge/cpu.py"},
    "transformers": {"bridge/hf_config.py"},
    "torch.distributed": {"bridge/ranks.py", "bridge/torch_dist.py"},
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
    assert not {name.partition(".")[0] for name in imported} & FORBIDDEN[room]
    for framework, doors in ONLY_IN.items():
        if any(name == framework or name.startswith(framework + ".") for name in imported):
            inside = str(path.relative_to(ROOT)).startswith(tuple(doors))
            assert inside, f"{framework} is imported outside {doors}"


def test_mappings_and_export_import_without_the_frameworks() -> None:
    """On a machine where neither Megatron nor ModelOpt is installed, both packages import."""
    code = (
        "import sys\n"
        "for name in ('megatron', 'modelopt', 'transformers', 'hydra'): sys.modules[name] = None\n"
        "import mappings, mappings.families, export, export.finalizer, export.runtime, export.schemes, export.staging\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_public_names() -> None:
    """The names that users import stay where they are."""
    import mappings

    assert set(mappings.__all__) >= {
        "AmaxFanoutMapping",
        "AmaxMapping",
        "AutoMapping",
        "ColumnParallelMapping",
        "DirectMapping",
        "GatedMLPMapping",
        "MappingRegistry",
        "MegatronParamMapping",
        "MoeAmaxFanoutMapping",
        "QKVMapping",
        "ReplicatedMapping",
        "RowParallelMapping",
        "convert_to_amax_map",
    }
    assert all(hasattr(mappings, name) for name in mappings.__all__)
