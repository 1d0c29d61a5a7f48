"""Everything that needs no extra works with the wheel and core dependencies alone: `make test-core`.

The model and the checkpoint are made by this environment, which has all extras, and so is the export that the other is
compared with: `python -m tests.support.core_only --python PYTHON_OF_THE_OTHER`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from amaxbridge.mappings.extras import EXTRAS

type Command = Callable[..., tuple[int, str]]
"""Runs `amaxbridge WORD …` without the extras: exit status, and all that it printed."""

NAMES = """
import importlib.util, json, pathlib, sys, amaxbridge
site = pathlib.Path(amaxbridge.__file__).parents[1]
ours = [line.split(",")[0].split("/")[0] for line in next(site.glob("amaxbridge-*.dist-info/RECORD")).open()]
print(json.dumps([sorted({name for name in ours if name != ".." and not name.endswith(".dist-info")}),
    [name for name in sys.argv[1:] if importlib.util.find_spec(name)], amaxbridge.__version__]))
"""


def make_sources(root: Path, command: Command) -> None:
    """A model in `root/hf`, quantized in `root/hf_nvfp4`, and `root/checkpoint`, a Megatron checkpoint of that.

    Args:
        command: with the extras.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(23)
    sizes = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).bfloat16().save_pretrained(root / "hf")
    succeed(command, "quantize", f"input={root / 'hf'}", f"output={root / 'hf_nvfp4'}", "scheme=nvfp4a16")
    succeed(command, "import", f"hf={root / 'hf_nvfp4'}", f"output={root / 'checkpoint'}")
    export(command, root, "expected")


def export(command: Command, root: Path, name: str) -> str:
    """Exports the checkpoint to `root/NAME`."""
    words = [f"checkpoint={root / 'checkpoint'}", f"hf={root / 'hf'}", f"output={root / name}", "scheme=nvfp4a16"]
    return succeed(command, "export", *words)


def check(root: Path, command: Command) -> None:
    """Runs commands that need no extra, and one that does and must say so.

    Args:
        command: without the extras.
    """
    hf, quantized, page = root / "hf", root / "quantized", root / "page"
    succeed(command, "quantize", f"input={hf}", f"output={quantized}", "scheme=nvfp4a16")
    same_weights(quantized, root / "hf_nvfp4")
    assert "transformers is not installed" in succeed(command, "verify", f"input={quantized}")
    succeed(command, "verify", f"input={quantized}", f"reference={hf}")
    succeed(command, "report", f"input={quantized}", f"reference={hf}", f"output={page}")  # torch brings jinja2
    assert json.loads((page / "report.json").read_text())
    assert "<html" in (page / "report.html").read_text()
    assert "transformers is not installed" in export(command, root, "exported")
    same_weights(root / "exported", root / "expected")
    succeed(
        command,
        "quantize",
        f"input={quantized}",
        f"output={root / 'again'}",
        "converter=compressed_tensors",
        "scheme=nvfp4a16",
    )
    same_weights(root / "again", quantized)  # in the scheme asked for already
    status, said = command("import", f"hf={hf}", f"output={root / 'none'}")
    assert status == 2, said
    assert "pip install 'amaxbridge[megatron]'" in said
    assert "Traceback" not in said
    assert not (root / "none").exists()


def succeed(command: Command, *words: object) -> str:
    """Runs a command, which must succeed, and returns what it printed."""
    status, said = command(*words)
    assert status == 0, f"{' '.join(map(str, words))} ended with {status}:\n{said}"
    return said


def same_weights(one: Path, other: Path) -> None:
    """Asserts that both directories have the same weight files, byte for byte."""
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files == sorted(path.name for path in other.glob("*.safetensors"))
    assert files
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def run(python: Sequence[str], root: Path) -> Command:
    """Commands of the package that an interpreter finds, outside of the checkout."""

    def command(*words: object) -> tuple[int, str]:
        line = [*python, "-m", "amaxbridge", *map(str, words)]
        ran = subprocess.run(line, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return ran.returncode, ran.stdout

    return command


def main() -> None:
    """Makes the sources with this interpreter, and runs the checks with the other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", required=True)
    there = str(Path(parser.parse_args().python).absolute())  # not resolved: a link in an environment
    modules = [module.partition(".")[0] for modules in EXTRAS.values() for module in modules]
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        found = subprocess.run([there, "-c", NAMES, *modules], cwd=root, check=True, capture_output=True, text=True)
        names, installed, version = json.loads(found.stdout)
        assert names == ["amaxbridge"], f"the wheel installs {names}"
        assert installed == ["jinja2"], f"{installed} are installed; torch brings jinja2, nothing else brings another"
        make_sources(root, run([sys.executable], root))
        check(root, run([there], root))
    print(f"amaxbridge {version} quantizes, verifies, reports and exports with core dependencies only")


if __name__ == "__main__":
    main()
