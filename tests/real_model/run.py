"""`make real-model`: a trained model through every conversion, measured; writes the tables of docs/real-model.md.

    python -m tests.real_model.run --packages DIR [--keep DIR]

Exit status 1 if something is not as README.md here promises. What lies in the directory to keep is not made again.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.export.schemes import SCHEMES, Groups, named_scheme
from tests.real_model.score import Scores, score
from tests.real_model.text import CALIBRATION_WINDOWS, CONTEXT, WINDOWS, held_back_windows
from tests.support.paths import ENVIRONMENT, ROOT

PAGE = ROOT / "docs" / "real-model.md"
RANKS = 3  # tensor-parallel; the model has three key-value heads
_TABLES = re.compile(r"(<!-- real-model -->\n).*?(<!-- /real-model -->)", re.DOTALL)

# Scheme, columns that share a scale where that is open, and how far perplexity may rise above that of bf16: about twice
# what was measured. A scale that is off, or swapped halves, give perplexities in the thousands.
DATA_FREE: tuple[tuple[str, int | None, float], ...] = (
    ("fp8_dynamic", None, 0.10),
    ("mxfp8", None, 0.10),
    ("mxfp8a16", None, 0.10),
    ("w8a8", None, 0.15),
    ("w8a16", 64, 0.05),
    ("w4a16", 64, 1.0),
    ("w4a16", 32, 1.0),
    ("w4a16_asym", 64, 1.0),
    ("nvfp4a16", None, 1.0),
    ("mxfp4a16", None, 2.0),
    ("mxfp4", None, 10.0),
)
NOT_IN_TRANSFORMERS = ("w4a16_asym",)  # scored in amaxbridge.export.runtime
NOT_FOR_THIS_MODEL = ("w4afp8", "fp8_block")  # scale 128 inputs at a time, which do not divide 576

# Megatron and transformers sum in different orders; in fp32 that changes a log-probability by about 1e-5. Dequantized
# weights are rounded to bf16, which changes one by about 2e-3. Before an input quantizer such a change turns a 4-bit
# code here and there by a whole step, which turns others in the layers that follow. How far that goes is measured:
# transformers against itself, with every weight moved by up to half a unit in the last place of bf16.
SAME = {"bf16": 1e-3, "weights": 1e-2}  # mean change of a token's log-probability
MOVED = 1.5  # times what moved weights change
STANDARD_ERRORS = 4  # of the mean change, with quantized inputs
RECORDS = ("README.md", "amaxbridge.json")  # say how a directory was made, so they differ


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured: scores of checkpoints and of Megatron's stages, and directories that differ."""

    exported: Mapping[str, Scores]
    megatron: Mapping[str, Scores]
    data_free: Mapping[tuple[str, int | None], Scores]
    there_and_back: list[str]
    stored: list[str]
    steps: int

    @property
    def change_of_moved_weights(self) -> float:
        """The mean change of a token's log-probability in transformers if weights move by up to 2^-9."""
        return self.exported["moved"].change_from(self.exported["trained"])

    @property
    def standard_errors(self) -> float:
        """How far the quantized model in transformers is from that in Megatron: the mean change of a loss."""
        change = (self.exported["trained"].losses - self.megatron["trained"].losses).double().flatten()
        return float(change.mean().abs() / (change.std() / len(change) ** 0.5))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", required=True, type=Path, help="where the packages of requirements.txt are")
    parser.add_argument("--keep", type=Path, help="where everything goes, and stays")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(options.packages, options.keep or Path(temporary))
    tables = "\n".join([*data_free_table(found), "", *trained_table(found), "", *statements(found)]) + "\n"
    print(tables)
    PAGE.write_text(_TABLES.sub(lambda marks: marks[1] + tables + marks[2], PAGE.read_text()))
    failures = list(failures_of(found))
    print("\n".join(failures) or "all as it should be")
    return 1 if failures else 0


def measure(packages: Path, out: Path) -> Found:
    """Makes every directory that is missing, with the commands that a user types, and scores it."""
    hf, trained = out / "hf", out / "trained"
    python, ranks = [sys.executable], ["-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    convert = [*python, "-m", "tests.real_model.convert", hf]
    make(hf, convert, PYTHONPATH=f"{ROOT}{os.pathsep}{packages.absolute()}")

    plain, back = out / "plain_checkpoint", out / "back"
    amaxbridge = ["-m", "amaxbridge"]
    make(plain, [*python, *ranks, *amaxbridge, "import", f"hf={hf}", f"output={plain}", f"parallel.tp={RANKS}"])
    export = [*python, *amaxbridge, "export", f"hf={hf}"]
    make(back, [*export, f"checkpoint={plain}", f"output={back}", "scheme=none"])

    make(trained / "training.json", [*python, *ranks, "-m", "tests.real_model.train", hf, trained])
    stored = out / "stored"
    make(stored, [*export, f"checkpoint={trained / 'checkpoint'}", f"output={stored}", "scheme=nvfp4"])

    needs_no_calibration = {name for name, scheme in SCHEMES.items() if not scheme.needs_input_amax}
    listed = {*NOT_FOR_THIS_MODEL, *(scheme for scheme, _, _ in DATA_FREE)}
    assert listed == needs_no_calibration, "DATA_FREE is not the schemes that need no calibration"
    windows = held_back_windows(hf)
    torch.set_num_threads(os.cpu_count() or 1)
    live = trained / "live"
    exported = {"bf16": scored(hf, windows), "trained": scored(live, windows)}
    exported["weights"] = scored(live, windows, name="weights", quantize_inputs=False)
    exported["moved"] = scored(live, windows, name="moved", move_weights=True)
    data_free = dict[tuple[str, int | None], Scores]()
    for scheme, size, _ in DATA_FREE:
        directory = out / label(scheme, size)
        if not directory.exists():
            model_free_ptq(hf, directory, Groups.of(named_scheme(scheme, size)))
        data_free[scheme, size] = scored(directory, windows, in_runtime=scheme in NOT_IN_TRANSFORMERS)
    stages = ("bf16", "calibrated", "weights", "trained")
    megatron = {stage: Scores(torch.load(trained / f"losses_{stage}.pt")) for stage in stages}
    steps = len(json.loads((trained / "training.json").read_text())["divergences"])
    pairs = differing_tensors(hf, back), differing_files(live, stored)
    return Found(exported, megatron, data_free, *pairs, steps)


def make(target: Path, command: list[object], **environment: str) -> None:
    """Runs and shows a step whose target is missing.

    Raises:
        CalledProcessError: the step failed.
    """
    if target.exists():
        return
    words = [str(word) for word in command]
    print("\n$", " ".join(words), flush=True)
    subprocess.run(words, check=True, cwd=ROOT, env={**ENVIRONMENT, **environment})


def scored(directory: Path, windows: torch.Tensor, *, name: str = "", **how: bool) -> Scores:
    """The scores of a directory, which are kept beside it; see `score`."""
    file = directory.with_name(f"{name or directory.name}.scores.pt")
    if not file.exists():
        print(f"scoring {name or directory.name}", flush=True)
        found = score(directory, windows, **how)
        torch.save((found.losses, found.size), file)
    return Scores(*torch.load(file))


def differing_tensors(one: Path, other: Path) -> list[str]:
    """Names of tensors whose bits, dtypes or shapes differ, or that only one directory has."""
    first, second = (
        {name: tensor for file in sorted(each.glob("*.safetensors")) for name, tensor in load_file(file).items()}
        for each in (one, other)
    )
    both = first.keys() & second.keys()
    same = {
        name
        for name in both
        if first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))
    }
    return sorted((first.keys() | second.keys()) - same)


def differing_files(one: Path, other: Path) -> list[str]:
    """Names of files whose bytes differ, or that only one directory has; but for the records of how it was made."""
    hashes = [
        {
            str(file.relative_to(each)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in each.rglob("*")
            if file.is_file() and file.name not in RECORDS
        }
        for each in (one, other)
    ]
    return sorted(name for name in hashes[0].keys() | hashes[1].keys() if hashes[0].get(name) != hashes[1].get(name))


def failures_of(found: Found) -> Iterator[str]:
    """Everything that is not as it must be."""
    for what, names in (("there and back", found.there_and_back), ("live and stored", found.stored)):
        if names:
            yield f"{what}: {', '.join(names[:4])} differ, {len(names)} in all"
    for stage, limit in {**SAME, "trained": MOVED * found.change_of_moved_weights}.items():
        change = found.exported[stage].change_from(found.megatron[stage])
        if not change <= limit:
            yield f"{stage} in Megatron and transformers: {change:.2g} a token, more than {limit:.2g}"
    if not found.standard_errors <= STANDARD_ERRORS:
        yield f"NVFP4 in Megatron and as exported: {found.standard_errors:.1f} standard errors apart"
    if not found.megatron["trained"].perplexity < found.megatron["calibrated"].perplexity:
        yield "training through the quantizers did not help"
    for scheme, size, limit in DATA_FREE:
        rise = found.data_free[scheme, size].perplexity / found.exported["bf16"].perplexity - 1
        if not rise <= limit:
            yield f"{label(scheme, size)}: perplexity is {rise:.0%} above that of bf16, more than {limit:.0%}"


def label(scheme: str, size: int | None) -> str:
    return scheme if size is None else f"{scheme}_{size}"


def data_free_table(found: Found) -> Iterator[str]:
    """Markdown: a row for each scheme, bf16 first."""
    yield "| scheme | weights | inputs | MB | perplexity | above bf16 | change of a token's log-probability, mean |"
    yield "|---|---|---|---:|---:|---:|---:|"
    plain = found.exported["bf16"]
    yield f"| none | bf16 | – | {plain.size / 1e6:.0f} | {plain.perplexity:.2f} | | |"
    for (scheme, size), scores in found.data_free.items():
        group = SCHEMES[scheme].config_group
        option = f", `scheme.group_size={size}`" if size else ""
        rise, change = scores.perplexity / plain.perplexity - 1, scores.change_from(plain)
        cells = [f"`scheme={scheme}`{option}", *(bits(group[part]) for part in ("weights", "input_activations"))]
        cells += [f"{scores.size / 1e6:.0f}", f"{scores.perplexity:.2f}", f"{rise:.1%}", f"{change:.3f}"]
        yield f"| {' | '.join(cells)} |"


def bits(arguments: Mapping[str, object] | None) -> str:
    return "–" if arguments is None else f"{arguments['type']} {arguments['num_bits']}"


def trained_table(found: Found) -> Iterator[str]:
    """Markdown: perplexity at each stage of the training, in Megatron and, where it was exported, in transformers."""
    yield "| stage | Megatron | exported, in transformers | difference of a token's log-probability, mean |"
    yield "|---|---:|---:|---:|"
    names = {
        "bf16": "bf16",
        "calibrated": f"NVFP4 W4A4, calibrated on {CALIBRATION_WINDOWS} windows",
        "weights": f"the same after {found.steps} steps of QAT, inputs left unquantized",
        "trained": "the same, inputs quantized",
    }
    for stage, scores in found.megatron.items():
        exported = found.exported.get(stage)
        other = "– | –" if exported is None else f"{exported.perplexity:.3f} | {exported.change_from(scores):.1e}"
        yield f"| {names[stage]} | {scores.perplexity:.3f} | {other} |"


def statements(found: Found) -> Iterator[str]:
    """Markdown: the other comparisons, in sentences."""
    yield f"- Perplexity on {WINDOWS} windows of {CONTEXT} tokens."
    same = "equal, bit for bit" if not found.there_and_back else "**different**"
    yield f"- All tensors, imported at TP={RANKS} and exported again: {same}."
    same = "equal, byte for byte" if not found.stored else "**different**"
    yield f"- The NVFP4 export of the model in memory, and of its checkpoint on the disk: {same}."
    change = found.megatron["trained"].change_from(found.megatron["bf16"])
    yield (
        f"- Quantization, after QAT, changes a token's log-probability by {change:.3f} on average. The perplexities of "
        f"the last row are {found.standard_errors:.1f} standard errors apart."
    )
    yield (
        "- transformers against itself, with every quantized weight moved by up to 2^-9 of itself (half a unit in the "
        f"last place of bf16): {found.change_of_moved_weights:.3f} a token. The last row differs by no more."
    )


if __name__ == "__main__":
    sys.exit(main())
