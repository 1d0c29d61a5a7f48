"""The directory that model-free PTQ reads, and what can be wrong with it and with the arguments before any tensor."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from export.metadata import CONFIG_FILE
from export.schemes.recipe import is_named
from export.staging import check_output
from mappings.errors import UsageError, listing


def source_directory(model_stub: str | Path) -> Path:
    path = Path(model_stub)
    if not path.exists() and not path.is_absolute() and str(model_stub).count("/") == 1:
        return Path(snapshot_download(str(model_stub)))
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory of safetensors, nor the name of a model on the Hub")
    return path.absolute()


def check_paths(source: Path, target: Path, *, overwrite: bool) -> None:
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UsageError(f"output {target} and input {source} must not lie in one another: choose another output")
    check_output(target, overwrite=overwrite)


def read_config(source: Path, *, converted: bool) -> dict[str, Any]:
    """config.json; of a checkpoint that is quantized already only where a converter comes first."""
    file = source / CONFIG_FILE
    if not file.is_file():
        raise UsageError(f"{source} is not a Hugging Face model directory: no {CONFIG_FILE} there")
    try:
        config: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError as error:
        raise UsageError(f"{file} is not valid JSON: {error}") from error
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method and not converted:
        raise UsageError(
            f"{source} is quantized already ({method}): give a converter that dequantizes it, such as those of "
            "compressed_tensors.entrypoints.convert, or the checkpoint that it was made from"
        )
    return config


def check_ignored(ignore: Sequence[str], modules: Iterable[str]) -> None:
    """An `ignore` that matches nothing is a misspelling, and what it was to spare would be quantized."""
    modules = list(modules)
    idle = [target for target in ignore if not any(is_named(module, [target]) for module in modules)]
    if idle:
        raise UsageError(f"{len(idle)} entries of ignore match no module:{listing(idle)}")


def fingerprint_of(source: Path, files: Iterable[str]) -> str:
    """Names the source: a file that was written anew is another."""
    found = [(name, (source / name).stat()) for name in sorted(set(files))]
    return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in found])
