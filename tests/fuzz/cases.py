"""One fuzzed input and its outcome: a copy of a good input, one file of it changed, one public entry run on it.

refused   an exception of amaxbridge, whose message is text
done      the entry ended well, and what it read and wrote stands up to another reader
foreign, hang, silent   what must never happen: another exception; more CPU time than a second input would take;
          done, although another reader refuses what was read or written
"""

import json
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from safetensors import safe_open

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import expected_tensors, read_hf_model
from amaxbridge.export import model_free_ptq
from amaxbridge.export.model_free.inverse_weight_maps import build_microscale_inverse_weight_maps
from amaxbridge.export.model_free.per_file import process_file, validate_file
from amaxbridge.export.report import write_report
from amaxbridge.export.runtime import load_linear
from amaxbridge.export.verify import verify
from amaxbridge.mappings.errors import AmaxbridgeError
from tests.fuzz import mutations
from tests.fuzz.inputs import INDEX

_SECONDS = 20.0  # of CPU time; a case takes a tenth of one


class Hang(BaseException):
    """The case has used its CPU time."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case."""

    entry: str
    change: str
    what: str
    detail: str = ""

    @property
    def is_bad(self) -> bool:
        return self.what in ("foreign", "hang", "silent")


# What is run on the input, in a scratch directory that holds a copy of it


def _verify(root: Path) -> None:
    report = verify(root / "quantized", tp=2)
    json.dumps(report.as_json(), allow_nan=False).encode()
    if report.ok:
        _stands_up(root / "quantized")


def _verify_against(root: Path) -> None:
    json.dumps(verify(root / "quantized", reference=root / "plain").as_json(), allow_nan=False).encode()


def _verify_state(root: Path) -> None:
    verify(root / "quantized", reference=root / "state.safetensors")


def _quantize(root: Path) -> None:
    model_free_ptq(root / "plain", root / "out", "nvfp4a16", device="cpu")
    _stands_up(root / "plain")
    _stands_up(root / "out")
    _keeps_everything(root / "plain", root / "out")


def _quantize_with_state(root: Path) -> None:
    model_free_ptq(root / "plain", root / "out", "nvfp4", device="cpu", quant_state=root / "state.safetensors")
    _stands_up(root / "out")
    _keeps_everything(root / "plain", root / "out")


def _file_by_file(root: Path) -> None:
    weight_map = json.loads((root / "plain" / INDEX).read_bytes())["weight_map"]  # a caller's own, not ours to read
    files = {file.name: str(file) for file in (root / "plain").glob("*.safetensors")}
    maps = build_microscale_inverse_weight_maps({n: f for n, f in weight_map.items() if f in files}, files)
    for name, wanted in maps.items():
        validate_file(wanted, root / "out" / name, "nvfp4a16")
        (root / "out").mkdir(exist_ok=True)
        process_file(wanted, root / "out" / name, "nvfp4a16", device="cpu")


def _report(root: Path) -> None:
    write_report(root / "quantized", reference=root / "plain", card=True)
    _is_strict(root / "quantized" / "report.json")


def _describe(root: Path) -> None:
    for directory in (root / "plain", root / "described"):
        hf = read_hf_model(directory)
        seen = (hf.registry, hf.model_config, hf.file_tensors, expected_tensors(directory))
        assert len(seen) == 4
        try:
            hf.family.check_buildable(hf.config)
        finally:
            hf.family.layer_pattern(hf.config)


def _import(root: Path) -> None:
    """What an import reads; building Megatron's model of it takes real ranks."""
    bridge = AutoBridge.from_hf_pretrained(root / "quantized")
    with bridge.open_weights() as weights:
        for name in weights.checkpoint.weight_map:
            if name.endswith((".weight", ".weight_packed")):
                weights.read(name.replace(".weight_packed", ".weight"))
        dict(weights.state.amax)


def _runtime(root: Path) -> None:
    load_linear(root / "quantized", "model.layers.0.self_attn.qkv_proj")
    load_linear(root / "quantized", "model.layers.0.self_attn.o_proj", tp_rank=1, tp_size=2)


def _export(root: Path) -> None:
    AutoBridge.from_hf_pretrained(root / "described").convert_checkpoint(root / "stored", root / "out", scheme="none")
    _stands_up(root / "out")


def _identify(root: Path) -> None:
    AutoBridge.from_megatron_checkpoint(root / "stored")


type Change = Callable[[Path, Random], None]


def _of(change: Change, *files: str) -> Mapping[str, tuple[Change, str]]:
    return {f"{change.__name__} {file}": (change, file) for file in files}


_PLAIN = {
    **_of(mutations.json_file, "plain/config.json", f"plain/{INDEX}"),
    **_of(mutations.header, "plain/a.safetensors"),
    **_of(mutations.raw, "plain/config.json", f"plain/{INDEX}", "plain/a.safetensors", "plain/tokenizer.json"),
    **_of(mutations.values, "plain/a.safetensors"),
    **_of(mutations.card, "plain/README.md"),
}
_CONFIG = _of(mutations.json_file, "plain/config.json", "described/config.json")
_QUANTIZED = {
    **_of(mutations.json_file, "quantized/config.json", f"quantized/{INDEX}", "quantized/amaxbridge.json"),
    **_of(mutations.header, "quantized/a.safetensors", "quantized/quant_state.safetensors"),
    **_of(mutations.state_metadata, "quantized/quant_state.safetensors"),
    **_of(mutations.raw, "quantized/config.json", "quantized/a.safetensors", "quantized/amaxbridge.json"),
    **_of(mutations.values, "quantized/a.safetensors", "quantized/b.safetensors"),
    **_of(mutations.card, "quantized/README.md"),
}
_STATE = {
    **_of(mutations.header, "state.safetensors"),
    **_of(mutations.state_metadata, "state.safetensors"),
    **_of(mutations.raw, "state.safetensors"),
    **_of(mutations.values, "state.safetensors"),
}
_ITERATION = "stored/iter_0000005"
_STORED = {
    **_of(mutations.json_file, "described/config.json"),
    **_of(mutations.pickled, f"{_ITERATION}/.metadata"),
    **_of(mutations.raw, f"{_ITERATION}/.metadata", f"{_ITERATION}/__0_0.distcp"),
    **_of(mutations.raw, "stored/latest_checkpointed_iteration.txt"),
    **_of(mutations.raw, f"{_ITERATION}/common.pt"),
    **_of(mutations.saved, _ITERATION),
}
ENTRIES: Mapping[str, tuple[Callable[[Path], None], Mapping[str, tuple[Change, str]]]] = {
    "verify": (_verify, _QUANTIZED),
    "verify reference=directory": (_verify_against, {**_QUANTIZED, **_PLAIN}),
    "verify reference=state": (_verify_state, {**_QUANTIZED, **_STATE}),
    "quantize": (_quantize, _PLAIN),
    "quantize quant_state=": (_quantize_with_state, {**_STATE, **_PLAIN}),
    "process_file": (_file_by_file, {name: each for name, each in _PLAIN.items() if "a.safetensors" in name}),
    "report": (_report, {**_QUANTIZED, **_PLAIN}),
    "read_hf_model": (_describe, _CONFIG),
    "import": (_import, _QUANTIZED),
    "runtime": (_runtime, _QUANTIZED),
    "export": (_export, _STORED),
    "export without hf=": (_identify, _STORED),
}
"""Each public entry, and the changes that it can meet: name → the change, and the file."""


def run_case(inputs: Path, scratch: Path, entry: str, random: Random, *, changed: bool = True) -> Outcome:
    """Changes a copy of the inputs and runs an entry on it; without a change if `changed` is False."""
    run, changes = ENTRIES[entry]
    name = random.choice(sorted(changes))
    change, file = changes[name]
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(inputs, scratch)
    if changed:
        change(scratch / file, random)
    try:
        with _limited():
            run(scratch)
    except AmaxbridgeError as error:
        said = str(error)
        return Outcome(entry, name, "refused" if said.isprintable() or "\n" in said else "foreign", said)
    except Silent as error:
        return Outcome(entry, name, "silent", str(error))
    except Hang:
        return Outcome(entry, name, "hang", traceback.format_exc())
    except Exception:
        return Outcome(entry, name, "foreign", traceback.format_exc())
    return Outcome(entry, name, "done")


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


# Other readers


class Silent(Exception):
    """An entry ended well on what another reader refuses."""


def _stands_up(directory: Path) -> None:
    """The safetensors library reads every file of weights, and every JSON file of ours is strict."""
    for file in directory.glob("*.safetensors"):
        if file.name == "quant_state.safetensors":  # lies beside a checkpoint and is no part of it
            continue
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    opened.get_slice(name).get_shape()
        except Exception as error:
            raise Silent(f"{file.name}: {error}") from error
    for name in ("config.json", INDEX, "amaxbridge.json"):
        is_read = name != "amaxbridge.json" or directory.name == "out"  # nothing but a report reads it
        if is_read and (directory / name).is_file():
            _is_strict(directory / name)


def _is_strict(file: Path) -> None:
    def refuse(constant: str) -> Any:
        raise Silent(f"{file.name} has {constant}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise Silent(f"{file.name} has a key twice")
        return dict(pairs)

    of_ours = file.parent.name in ("out",) or file.name == "report.json"  # sources may have NaN and Infinity
    try:
        json.loads(file.read_bytes().decode(), parse_constant=refuse if of_ours else None, object_pairs_hook=once)
    except ValueError as error:
        raise Silent(f"{file.name}: {error}") from error


def _keeps_everything(source: Path, output: Path) -> None:
    """Every tensor of the source is in the output, itself or quantized."""
    names = set[str]()
    for file in output.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if name not in names and f"{name}_packed" not in names and "gate_up_proj" not in name:
                    raise Silent(f"{name} is in the source alone")


def seconds() -> float:
    """CPU time of this process."""
    return time.process_time()
