"""The documentation does what it says: every command in it is run, every message and every link in it exists.

A page is run from its top to its end in a directory of its own that has what the page's reader has (`places`). Run are
lines of code blocks that start with `amaxbridge`, `python examples/` or `torchrun`, and Python blocks that say
on how many ranks: ```python ranks=2. A YAML block whose first line is a comment with a path is that file.
"""

import ast
import json
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.export.amax.fused_group_amax import GroupAmax
from amaxbridge.export.schemes import SCHEMES
from amaxbridge.export.schemes.scheme import quantize_tensors
from tests.support.adapters import ALPHA, RANK, adapters_for
from tests.support.checkpoints import dense_model, write_checkpoint
from tests.support.launcher import Launcher, LiveRanks
from tests.support.paths import ROOT
from tests.support.stored_checkpoints import megatron_state, write_state

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RANKS = "2"
"""For `N` in a command."""

WITH_A_MODEL = """
from amaxbridge.bridge import AutoBridge, megatron
from tests.workers.live_moe import insert_quantizers, set_amax_from_names

with megatron.distributed(tp=1):
    bridge = AutoBridge.from_hf_pretrained("HF_DIR")
    model = megatron.build_model(bridge.hf)
    bridge.load_hf_weights(model)
    insert_quantizers(model)
    set_amax_from_names([model])
"""
"""What comes before lines that stand for a training of the reader's own."""

page_of = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture(scope="module")
def places(live: LiveRanks, qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the names in the documentation stand for."""
    trained = live.at(tp=2)
    return {
        "HF_DIR": live.hf,
        "MOE_DIR": qwen3_moe,
        "path/to/hf_dir": live.hf,
        "CKPT": trained / "checkpoint",
        "PLAIN_CKPT": plain_checkpoint(live.hf, tmp_path_factory.mktemp("plain")),
        "REWARD_CKPT": reward_checkpoint(live.hf, tmp_path_factory.mktemp("reward")),
        "LORA_CKPT": lora_checkpoint(live.hf, tmp_path_factory.mktemp("lora")),
        "SERVED": trained / "nvfp4",
        "STEP_1": trained / "nvfp4",
        "STEP_2": a_step_later(trained / "nvfp4", tmp_path_factory.mktemp("step") / "STEP_2"),
        "BAD": served_wrong(trained / "nvfp4", tmp_path_factory.mktemp("bad") / "BAD"),
        "examples": ROOT / "examples",
        "FP8_DIR": block_quantized(tmp_path_factory.mktemp("fp8")),
    }


def a_step_later(served: Path, directory: Path) -> Path:
    """A checkpoint with other bytes in one tensor."""
    shutil.copytree(served, directory)
    file = next(directory.glob("*.safetensors"))
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if name.endswith("weight_packed"))[0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def served_wrong(served: Path, directory: Path) -> Path:
    """A checkpoint whose `ignore` forgets the output layer."""
    shutil.copytree(served, directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["ignore"].clear()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def plain_checkpoint(hf: Path, directory: Path) -> Path:
    """A Megatron checkpoint of a training without quantizers, and its optimizer's fp32 main parameters."""
    state = megatron_state(read_hf_model(hf))
    main = {f"optimizer.state.param.{name}": tensor.float() for name, tensor in state.items()}
    return write_state(directory / "checkpoint", {**state, **main})


def reward_checkpoint(hf: Path, directory: Path) -> Path:
    """The same of a reward model."""
    state = megatron_state(read_hf_model(hf))
    head = torch.ones(1, state["output_layer.weight"].shape[1], dtype=torch.bfloat16)
    return write_state(directory / "checkpoint", {**state, "output_layer.weight": head})


def lora_checkpoint(hf: Path, directory: Path) -> Path:
    """Adapters alone, as Megatron-Bridge saves them."""
    write_state(directory / "checkpoint", adapters_for(read_hf_model(hf), "lora").megatron)
    config = f"peft: {{_target_: megatron.bridge.peft.lora.LoRA, alpha: {ALPHA:g}, dim: {RANK}}}"
    (directory / "checkpoint" / "iter_0000005" / "run_config.yaml").write_text(config)
    return directory / "checkpoint"


def block_quantized(directory: Path) -> Path:
    """A small checkpoint in the FP8 blocks of DeepSeek-V3."""
    tensors = dense_model(layers=1)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        module = name.removesuffix(".weight")
        weights = {module: tensors.pop(name)}
        for made, tensor in quantize_tensors(SCHEMES["fp8_block"], weights, GroupAmax(None, None)):
            tensors[made.replace("weight_scale", "weight_scale_inv")] = tensor
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return write_checkpoint(
        directory, tensors, config={"architectures": ["Qwen3ForCausalLM"], "quantization_config": config}
    )


@page_of
def test_every_command_runs(page: Path, launch: Launcher, places: dict[str, Path], tmp_path: Path) -> None:
    for name, place in places.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(place)
    for number, (kind, text) in enumerate(steps(page.read_text())):
        if kind == "file":
            file = tmp_path / text.splitlines()[0].removeprefix("# ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        elif kind == "command":
            run(text, launch, tmp_path)
        elif kind == "model":
            (tmp_path / f"{number}.py").write_text(WITH_A_MODEL + textwrap.indent(text, "    "))
            clear(tmp_path, outputs := re.findall(r'save_\w+\(model, "(\w+)"', text))
            launch(tmp_path / f"{number}.py", cwd=tmp_path)
            assert outputs and all((tmp_path / output / "config.json").exists() for output in outputs)
        else:
            (tmp_path / f"{number}.py").write_text(text)
            clear(tmp_path, re.findall(r'save_\w+\(model, (?:Path\()?"(\w+)"', text))
            launch(tmp_path / f"{number}.py", processes=int(kind), cwd=tmp_path)


def run(command: str, launch: Launcher, directory: Path) -> None:
    program, *words = shlex.split(command, comments=True)
    processes = "1"
    if program == "torchrun":
        option, _, processes = words.pop(0).partition("=")
        assert option == "--nproc-per-node", command
        processes = processes or words.pop(0)
        if words[0] == "-m":
            _, program, *words = words
    if program == "amaxbridge":
        words = ["amaxbridge/__main__.py", *words]
    clear(directory, [word.removeprefix("output=") for word in words if word.startswith("output=")])
    script, *options = words
    count = int(RANKS if processes == "N" else processes)
    launch(ROOT / script, *options, processes=count, cwd=directory)


def clear(directory: Path, outputs: list[str]) -> None:
    """Commands of a page that write to one name are alternatives."""
    for output in outputs:
        shutil.rmtree(directory / output, ignore_errors=True)


def steps(text: str) -> Iterator[tuple[str, str]]:
    """Commands, files and programs of a page in order: what it is, or for a program how many ranks, and its text.

    A Python block without `ranks=` is some lines of a program that has a `model`.
    """
    for kind, block in blocks(text):
        if kind == "python":
            yield "model", block
        elif ranks := re.fullmatch(r"python ranks=(\d+)", kind):
            yield ranks[1], block
        elif kind == "yaml" and block.startswith("# "):
            yield "file", block
        elif kind in ("", "sh", "bash", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.strip().removeprefix("$ ")
                if re.match(r"amaxbridge |python examples/|torchrun ", command):
                    yield "command", command


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The code blocks of a page, fenced or indented: the language of a fence, "" without one; the text."""
    for found in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$|^((?: {4}.*\n|\n)+)", text, re.MULTILINE):
        if found[3] is None:
            yield found[1].strip(), found[2]
        else:
            yield "", re.sub(r"^ {4}", "", found[3], flags=re.MULTILINE)


@page_of
def test_every_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    lines = [line.strip() for _, block in blocks(text) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", text)
    named = {word for line in lines if line.startswith("make ") for word in shlex.split(line, comments=True)[1:]}
    assert {word for word in named if "=" not in word} <= targets


@page_of
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[\w-]+)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_message_is_one_of_the_program() -> None:
    """The headings of docs/troubleshooting.md are the program's messages, with … for what varies."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(messages) > 20
    assert [message for message in messages if not any(message in text for text in texts())] == []


@cache
def texts() -> tuple[str, ...]:
    """All texts in the source, with … for what is filled in."""
    rooms = ("amaxbridge", "scripts", "bridge", "export", "mappings")
    trees = [ast.parse(file.read_text()) for room in rooms for file in (ROOT / room).rglob("*.py")]
    return tuple(found for tree in trees for node in ast.walk(tree) if (found := text_of(node)))


def text_of(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "…" for part in node.values)
    return re.sub("%[ds]", "…", node.value) if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_the_python_of_the_readme_is_run() -> None:
    """`test_every_command_runs` would pass on a page in which it recognizes nothing."""
    kinds = [kind for kind, _ in steps((ROOT / "README.md").read_text())]
    assert kinds.count("model") == 1
    assert kinds.count("command") >= 2
