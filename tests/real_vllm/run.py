"""The whole comparison, from Megatron ranks to the table of docs/in-vllm.md: `make test-vllm`.

    python -m tests.real_vllm.run --vllm .venv-vllm/bin/python [--keep DIR]

Exit status 1 where anything differs from what README.md here promises.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.real_vllm import prepare
from tests.support.paths import ROOT

SERVE = Path(__file__).with_name("serve.py")
_TABLE = re.compile(r"(<!-- vllm -->\n).*?(<!-- /vllm -->)", re.DOTALL)
TABLES = (ROOT / "docs" / "in-vllm.md", Path(__file__).with_name("README.md"))

# How far a dequantized weight may be from the source, relative norm: half a step of the format, measured on a normal
# distribution, and a fifth more.
FROM_SOURCE = {
    "nvfp4": 0.12, "nvfp4a16": 0.12, "mxfp4": 0.16, "mxfp8": 0.04, "fp8": 0.04, "fp8_dynamic": 0.04, "fp8_block": 0.04,
    "w4a16": 0.16, "w4a16_asym": 0.14, "w8a8": 0.015,
}  # fmt: skip
ONE_BIT = 2**-7  # of bf16, at most
UNLIKE_OURS = {"nvfp4": ONE_BIT, "nvfp4a16": ONE_BIT}  # relative, of each value; see README.md
LOGPROBS = {"float32": 1e-5, "bfloat16": 0.03}  # mean; see README.md
TURNED_CODES = ("fp8_dynamic", "w8a8")  # of which a tenth of the tokens must keep to the limit
COMPUTED = {"float32": 1e-5, "bfloat16": 2**-7}  # of the largest weight: a kernel's rounding of its output
# What vLLM's models have and checkpoints need not: the state of a quantized cache, and inputs of experts without any.
UNUSED = {"nvfp4a16": re.compile(r"\.attn\.[qkv]_(scale|zero_point)$|\.experts\..*\.input_global_scale$")}
UNUSED_EVERYWHERE = re.compile(r"\.attn\.[qkv]_(scale|zero_point)$")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", required=True, help="python of the environment that has vLLM")
    parser.add_argument("--keep", type=Path, help="where the checkpoints go, and stay")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        made = options.keep or Path(temporary) / "made"
        if not made.exists():
            prepare.main(made)
        cases = serve(options.vllm, made)
    found = "\n".join([*rows(cases), "", *reasons(cases)]) + "\n"
    print(found)
    for file in TABLES:
        file.write_text(_TABLE.sub(lambda marks: marks[1] + found + marks[2], file.read_text()))
    failures = [f"{label(case)} rank {case['rank']}: {failure}" for case in cases for failure in failures_of(case)]
    print("\n".join(failures) or f"{len(cases)} loads, counting each rank; nothing differs")
    return 1 if failures else 0


def serve(vllm: str, made: Path) -> list[dict[str, Any]]:
    """What vLLM found, in one process and in two."""
    cases: list[dict[str, Any]] = []
    launchers: Mapping[str, Sequence[str]] = {
        "tp1.json": (),
        "tp2.json": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    }
    for name, launcher in launchers.items():
        subprocess.run([vllm, *launcher, SERVE, made, made / name], check=True)
        cases += json.loads((made / name).read_text())
    return cases


def label(case: Mapping[str, Any]) -> str:
    return f"{case['model']} {case['scheme']} TP={case['tp']}"


def failures_of(case: Mapping[str, Any]) -> Iterator[str]:
    """Everything that is not as it must be."""
    scheme = case["scheme"]
    if not case["loaded"]:
        yield f"does not load: {case.get('refused', case.get('bfloat16'))}"
        return
    for what in ("not held", "nan", "differ"):
        if case[what]:
            yield f"{what}: {', '.join(case[what][:4])} and others, {len(case[what])} in all"
    strange = [name for name in case["not stored"] if not UNUSED.get(scheme, UNUSED_EVERYWHERE).search(name)]
    if strange:
        yield f"not in the checkpoint: {', '.join(strange[:4])}, {len(strange)} in all"
    limits = {
        "ours": UNLIKE_OURS.get(scheme, 0.0),
        "source": FROM_SOURCE.get(scheme, 0.0),
        "computed": COMPUTED[case["dtype"]],
    }
    for what, limit in limits.items():
        if case.get(what, 0.0) > limit:
            yield f"{what}: {case[what]:.2g}, more than {limit:.2g}"
    if "logprobs" in case:
        limit = LOGPROBS[case["dtype"]]
        found = case["logprobs"]["a tenth" if scheme in TURNED_CODES else "mean"]
        if not found <= limit:
            yield f"log-probabilities differ by {found:.2g}, more than {limit:.2g}"
        if case["dtype"] == "float32" and scheme not in TURNED_CODES and not case["next tokens"]:
            yield "another next token"


def rows(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: a row for each model and scheme, the worst of its meshes."""
    yield (
        "| model | scheme | loaded at | tensors as stored | vLLM's dequantization | from the source "
        "| weights in the kernel | log-probabilities: a tenth of the tokens | mean | largest | in |"
    )
    yield "|---|---|---|---:|---|---:|---:|---:|---:|---:|---|"
    for key in dict.fromkeys(map(row_of, cases)):
        loaded = [case for case in cases if row_of(case) == key and case["loaded"]]
        yield "| " + " | ".join([*key[:2], *cells(loaded)]) + " |"


def row_of(case: Mapping[str, Any]) -> tuple[str, str, str]:
    return case["model"], case["scheme"], case["dtype"]


def cells(loaded: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield ", ".join(dict.fromkeys(f"TP={case['tp']}" for case in loaded)) or "refused"
    good, total = (
        sum(case["tensors"] - len(case["differ"]) - len(case["not held"]) for case in loaded),
        sum(case["tensors"] for case in loaded),
    )
    yield f"{good} of {total}"
    unlike = max((case["ours"] for case in loaded if "ours" in case), default=None)
    yield "–" if unlike is None else "ours" if unlike == 0 else f"ours within {unlike:.0e}"
    for what, form in (("source", ".1%"), ("computed", ".0e")):
        worst = max((case[what] for case in loaded if what in case), default=None)
        yield "–" if worst is None else format(worst, form)
    served = [case for case in loaded if "logprobs" in case]
    for what in ("a tenth", "mean", "largest"):
        yield f"{max(case['logprobs'][what] for case in served):.0e}" if served else "–"
    yield ", ".join(dict.fromkeys(case["dtype"] for case in served)) or "no kernel"


def reasons(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Why vLLM computed nothing, in its words; one of a kind."""
    said: dict[str, list[str]] = {}
    for case in cases:
        if "logprobs" not in case:
            said.setdefault(" ".join(case["bfloat16"].split()), []).append(label(case))
    for why, who in said.items():
        yield f"- {', '.join(dict.fromkeys(who))}: `{why}`"


if __name__ == "__main__":
    sys.exit(main())
