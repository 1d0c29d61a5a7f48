"""What `modelopt.json` says of ModelOpt's format, held against the engines' sources: classes, algorithms, errors."""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from amaxbridge.export.schemes import named_scheme
from amaxbridge.export.schemes.modelopt import in_modelopt

_ROOMS = {
    "vllm": "vllm/model_executor/layers/quantization/modelopt.py",
    "sglang": "sglang/srt/layers/quantization/modelopt_quant.py",
}
_ALGORITHMS = "LINEAR_ALGOS"
"""vLLM's table of the algorithms that it serves for linear layers."""


def faults(engine: str, sources: Path, table: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """One line for each entry that the sources contradict.

    A method must be a class of the engine's file on ModelOpt; what an error quotes must stand there; and of vLLM, which
    has a table of algorithms, exactly the schemes in it are served for linear layers.

    Args:
        sources: the directory of the engine's Python files.
        table: scheme → linear, experts → the class that serves it, or `!` and why none does.
    """
    source = (sources / _ROOMS[engine]).read_text()
    module = ast.parse(source)
    classes = {node.name for node in ast.walk(module) if isinstance(node, ast.ClassDef)}
    text = re.sub(r'"\s*f?"', "", source)  # literals that stand side by side
    algorithms = _algorithms(module)
    for scheme, parts in table.items():
        for part, said in parts.items():
            quoted = re.match(r"!ValueError: ([^:\[\],]+)", said)
            if not said.startswith("!") and said not in classes:
                yield f"{engine}: {scheme}, {part}: no class {said}"
            elif quoted and quoted[1] not in text:
                yield f"{engine}: {scheme}, {part}: {quoted[1]!r} is not said"
        if algorithms:
            stored_as = in_modelopt(named_scheme(scheme)).stored_as.upper()  # as vLLM compares it
            listed = re.search(r"\[(.*)\]", parts["linear"])
            if parts["linear"].startswith("!") is (stored_as in algorithms):
                yield f"{engine}: {scheme} is {stored_as}, and {_ALGORITHMS} has {', '.join(algorithms)}"
            if listed and ast.literal_eval(listed[0]) != [*algorithms, "MIXED_PRECISION"]:
                yield f"{engine}: {scheme}: the error would list {', '.join(algorithms)}"


def _algorithms(module: ast.Module) -> list[str]:
    for node in module.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == _ALGORITHMS:
            assert isinstance(node.value, ast.Dict)
            found: list[Any] = [ast.literal_eval(key) for key in node.value.keys if key is not None]
            return found
    return []
