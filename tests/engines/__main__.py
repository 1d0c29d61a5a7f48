"""The tables of `export/architectures/`, read from the engines' sources: `make engines`.

Wheels come from PyPI without their dependencies; only their Python files are kept, in .engines. Nothing of an engine is
imported, but for transformers, which the test environment has. Exit status 1 if a table differs from what is committed
(`--write` writes it).
"""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from amaxbridge.export.schemes import SCHEMES
from tests.engines import modelopt_classes, modelopt_matchers
from tests.engines.architectures import SGLANG, VLLM, records
from tests.engines.matchers import recorded_cases
from tests.engines.merged_experts import merged_experts
from tests.engines.transformers_runs import served as served_by_transformers
from tests.support.paths import ROOT

SOURCES = ROOT / ".engines"
TABLES = ROOT / "export" / "architectures"
GOLDEN = ROOT / "tests" / "golden" / "engine_matchers.json"
GOLDEN_MODELOPT = GOLDEN.with_name("modelopt_matchers.json")
PINS = {"vllm": ("0.33.0", "0.17.0"), "sglang": ("0.5.23", "0.18.0")}
"""Version of the engine, and of compressed-tensors, which it pins."""


def sources(package: str, version: str) -> Path:
    """Unpacks the Python files of a wheel, and returns their directory."""
    target = SOURCES / f"{package}-{version}"
    if not target.is_dir():
        with tempfile.TemporaryDirectory() as work:
            pip = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "--dest",
                work,
            ]
            subprocess.run([*pip, f"{package}=={version}"], check=True)
            [wheel] = Path(work).glob("*.whl")
            partial = target.with_suffix(".partial")
            with zipfile.ZipFile(wheel) as opened:
                opened.extractall(partial, [name for name in opened.namelist() if name.endswith(".py")])
            partial.rename(target)
    return target


def asked_in_its_own_process(module: str, engine: str, given: object) -> Any:
    """What a module of this package prints for an engine, beside the compressed-tensors that the engine pins."""
    version, pinned = PINS[engine]
    path = f"{sources('compressed-tensors', pinned)}{os.pathsep}{ROOT}"
    made = subprocess.run(
        [sys.executable, "-m", f"tests.engines.{module}", engine, str(sources(engine, version))],
        input=json.dumps(given), env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(made.stdout)


def table(engine: str) -> dict[str, Any]:
    """The table of an engine that has model classes of its own."""
    version, pinned = PINS[engine]
    groups = {name: scheme.config_group for name, scheme in SCHEMES.items()}
    found = records(VLLM if engine == "vllm" else SGLANG, sources(engine, version))
    builds: list[str] = []
    architectures: dict[str, int | None] = {}
    for name, record in found.items():
        line = json.dumps(record)
        if record is not None and line not in builds:
            builds.append(line)
        architectures[name] = None if record is None else builds.index(line)
    return {
        "version": version,
        "compressed_tensors": pinned,
        "schemes": asked_in_its_own_process("dispatch", engine, groups),
        "language_models": {
            kind: name for kind, name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()) if name in architectures
        },
        "architectures": architectures,
        "builds": [json.loads(line) for line in builds],
    }


def table_of_transformers() -> dict[str, Any]:
    """The table of transformers, which has no names of its own: it is asked by loading."""
    import compressed_tensors
    import transformers

    versions = {"version": transformers.__version__, "compressed_tensors": compressed_tensors.__version__}
    return {**versions, "schemes": served_by_transformers(), "merges": merged_experts()}


def text(found: Mapping[str, Any]) -> str:
    """JSON with an entry a line, so that a difference can be read."""
    lines = []
    for key, value in found.items():
        if isinstance(value, dict):
            inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(each)}" for name, each in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        elif isinstance(value, list):
            lines.append(f" {json.dumps(key)}: [\n" + ",\n".join(f"  {json.dumps(each)}" for each in value) + "\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> int:
    """Compares the tables with the committed ones, or writes them. `modelopt.json`, written by hand, is compared."""
    sys.setrecursionlimit(20_000)
    made = {TABLES / f"{engine}.json": text(table(engine)) for engine in PINS}
    made[TABLES / "transformers.json"] = text(table_of_transformers())
    made[GOLDEN] = text({engine: asked_in_its_own_process("matchers", engine, recorded_cases()) for engine in PINS})
    given = modelopt_matchers.recorded_cases()
    made[GOLDEN_MODELOPT] = text(
        {engine: {"layers": asked_in_its_own_process("modelopt_matchers", engine, given)} for engine in PINS}
    )
    differing = [path for path, content in made.items() if not path.is_file() or path.read_text() != content]
    for path in differing:
        print(f"{path.relative_to(ROOT)} differs from what the engines' sources say")
        if "--write" in sys.argv:
            path.write_text(made[path])
    wrong = [
        fault
        for engine, schemes in json.loads((TABLES / "modelopt.json").read_text()).items()
        for fault in modelopt_classes.faults(engine, sources(engine, PINS[engine][0]), schemes)
    ]
    print("".join(f"modelopt.json: {fault}\n" for fault in wrong), end="")
    return int(bool(wrong or (differing and "--write" not in sys.argv)))


if __name__ == "__main__":
    sys.exit(main())
