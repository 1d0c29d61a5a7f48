"""One fuzzed input and its outcome: a copy of a good input, one file of it changed, one public entry run on it.

refused   an exception of amaxbridge, whose message is text
done      the entry ended well, and what it read and wrote stands up to another reader
foreign, hang, silent   what must never happen: another exception; more CPU time than a second input would take;
          done, although another reader refuses what was read or written
"""

import contextlib
import io
import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from safetensors import safe_open

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import expected_tensors, read_hf_model
from amaxbridge.bridge.stored.torch_dist import DistCheckpoint
from amaxbridge.export import model_free_ptq
from amaxbridge.export.disk import staging
from amaxbridge.export.disk.shard_writer import ShardWriter
from amaxbridge.export.model_free.inverse_weight_maps import build_microscale_inverse_weight_maps
from amaxbridge.export.model_free.per_file import process_file, validate_file
from amaxbridge.export.repair import repair
from amaxbridge.export.report import write_report
from amaxbridge.export.runtime import load_linear
from amaxbridge.export.verify import verify
from amaxbridge.mappings.errors import AmaxbridgeError
from tests.fuzz import mutations
from tests.fuzz.inputs import INDEX, TEXTS

_AT_THE_TOP = 2  # the inputs, and the file outside
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


def _repair(root: Path) -> None:
    """A repair ends in a checkpoint that verify takes and in which a second one finds nothing."""
    report = repair(root / "quantized", root / "out", unseen="layer_max", copy=True)
    json.dumps(report.as_json(), allow_nan=False).encode()
    (root / "out").rename(root / "mended")  # where amaxbridge.json is the source's, unless something was mended
    _stands_up(root / "mended")
    (root / "mended").rename(root / "out")
    if not report.ok or not verify(root / "out").ok:
        raise Silent("the repaired checkpoint does not serve")
    again = repair(root / "out", root / "again", unseen="layer_max", dry_run=True)
    if again.changes:
        raise Silent(f"a second repair would change {again.changes[0]}")


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


def _quantize_again(root: Path) -> None:
    model_free_ptq(root / "plain", root / "out", "fp8_dynamic", device="cpu")
    _stands_up(root / "plain")
    _stands_up(root / "out")


def _quantize_on(root: Path) -> None:
    model_free_ptq(root / "plain", root / "out", "nvfp4a16", device="cpu", overwrite=True)
    if _weights(root / "out") != _weights(root / "expected"):
        raise Silent("the output is not that of an undisturbed run")
    if (root / "out.partial").exists():
        raise Silent("out.partial is left")


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


def _report_alone(root: Path) -> None:
    write_report(root / "quantized", reference=root / "wide", card=True)
    _is_strict(root / "quantized" / "report.json")


def _describe(root: Path) -> None:
    hf = read_hf_model(root / "described")
    seen = (hf.registry, hf.model_config, hf.file_tensors, expected_tensors(root / "described"))
    assert len(seen) == 4
    try:
        hf.family.check_buildable(hf.config)
    finally:
        hf.family.layer_pattern(hf.config)


def _read_weights(root: Path) -> None:
    """What an import reads, without Megatron."""
    bridge = AutoBridge.from_hf_pretrained(root / "quantized")
    with bridge.open_weights() as weights:
        for name in weights.checkpoint.weight_map:
            if name.endswith((".weight", ".weight_packed")):
                weights.read(name.replace(".weight_packed", ".weight"))
        dict(weights.state.amax)


def _import(root: Path) -> None:
    """One rank, with Megatron's model."""
    from amaxbridge.bridge import import_hf, megatron  # late: it takes seconds
    from amaxbridge.bridge.live.process_ranks import process_group

    hf = read_hf_model(root / "quantized")
    with redirect_stdout(io.StringIO()), process_group(), megatron.distributed(tp=1):
        import_hf.import_hf(hf, root / "out")
    DistCheckpoint(root / "out")


def _runtime(root: Path) -> None:
    load_linear(root / "quantized", "model.layers.0.self_attn.qkv_proj")
    load_linear(root / "quantized", "model.layers.0.self_attn.o_proj", tp_rank=1, tp_size=2)


def _export(root: Path) -> None:
    AutoBridge.from_hf_pretrained(root / "described").convert_checkpoint(root / "stored", root / "out", scheme="none")
    _stands_up(root / "out")


def _identify(root: Path) -> None:
    AutoBridge.from_megatron_checkpoint(root / "stored")


# What is there before the change


def _as_it_is(root: Path, random: Random) -> None:
    pass


def _one_of(directory: str, becomes: str) -> Callable[[Path, Random], None]:
    """Chooses one of the inputs in a directory."""

    def choose(root: Path, random: Random) -> None:
        names = sorted(each.name for each in (root / directory).iterdir())
        (root / directory / random.choice(names)).rename(root / becomes)

    return choose


class _Stop(BaseException):
    """Ends a run in the middle."""


def _begin(root: Path, random: Random) -> None:
    """Leaves what a run leaves that was ended after some bundles, before the last step, or in the middle of it."""
    model_free_ptq(root / "plain", root / "expected", "nvfp4a16", device="cpu")
    (root / "out").mkdir()
    (root / "out" / "config.json").write_text("{}")
    wanted, seen = random.randrange(8), 0
    done, move = ShardWriter.done, staging.move_into_place

    def count(writer: ShardWriter, bundle: str) -> None:
        nonlocal seen
        done(writer, bundle)
        seen += 1
        if seen == wanted:
            raise _Stop

    def stop(*_: object, **__: object) -> None:
        raise _Stop

    with (
        contextlib.suppress(_Stop),
        patch.object(ShardWriter, "done", count),
        patch.object(staging, "move_into_place", stop if wanted else move),
        patch.object(staging.shutil, "rmtree", stop if not wanted else shutil.rmtree),
    ):
        model_free_ptq(root / "plain", root / "out", "nvfp4a16", device="cpu", overwrite=True)


type Change = Callable[[Path, Random], None]


def _of(change: Change, *files: str) -> Mapping[str, tuple[Change, str]]:
    return {f"{change.__name__} {file}": (change, file) for file in files}


def _in(directory: str, *names: str) -> list[str]:
    return [f"{directory}/{name}" for name in names]


_TEXTS = _in("plain", *TEXTS)
_PLAIN = {
    **_of(mutations.json_file, "plain/config.json", f"plain/{INDEX}"),
    **_of(mutations.header, "plain/a.safetensors"),
    **_of(mutations.raw, "plain/config.json", f"plain/{INDEX}", "plain/a.safetensors", *_TEXTS),
    **_of(mutations.values, "plain/a.safetensors"),
    **_of(mutations.card, "plain/README.md"),
    **_of(mutations.odd, "plain/config.json", f"plain/{INDEX}", "plain/a.safetensors", "plain/README.md", *_TEXTS),
}
_ALONE = {
    **_of(mutations.json_file, "plain/config.json"),
    **_of(mutations.header, "plain/model.safetensors"),
    **_of(mutations.raw, "plain/config.json", "plain/model.safetensors"),
    **_of(mutations.values, "plain/model.safetensors"),
}
_DECLARED = {
    **_ALONE,
    **_of(mutations.json_file, "plain/hf_quant_config.json"),
    **_of(mutations.raw, "plain/hf_quant_config.json"),
    **_of(mutations.odd, "plain/hf_quant_config.json"),
}
_CONFIG = _of(mutations.json_file, "described/config.json")
_OF_A_SCHEME = {
    **_of(mutations.json_file, "quantized/config.json", "quantized/amaxbridge.json"),
    **_of(mutations.header, "quantized/model.safetensors"),
    **_of(mutations.raw, "quantized/config.json", "quantized/model.safetensors"),
    **_of(mutations.values, "quantized/model.safetensors"),
}
_OF_MODELOPT = {
    **_OF_A_SCHEME,
    **_of(mutations.json_file, "quantized/hf_quant_config.json"),
    **_of(mutations.raw, "quantized/hf_quant_config.json"),
}
_QUANTIZED = {
    **_of(mutations.json_file, "quantized/config.json", f"quantized/{INDEX}", "quantized/amaxbridge.json"),
    **_of(mutations.header, "quantized/a.safetensors", "quantized/quant_state.safetensors"),
    **_of(mutations.state_metadata, "quantized/quant_state.safetensors"),
    **_of(mutations.raw, "quantized/config.json", "quantized/a.safetensors", "quantized/amaxbridge.json"),
    **_of(mutations.values, "quantized/a.safetensors", "quantized/b.safetensors"),
    **_of(mutations.card, "quantized/README.md"),
    **_of(
        mutations.odd,
        *_in("quantized", "config.json", INDEX, "a.safetensors", "amaxbridge.json", "README.md", "tokenizer.json"),
        *_in("quantized", "quant_state.safetensors", "report.json", "report.html"),
    ),
}
_STATE = {
    **_of(mutations.header, "state.safetensors"),
    **_of(mutations.state_metadata, "state.safetensors"),
    **_of(mutations.raw, "state.safetensors"),
    **_of(mutations.values, "state.safetensors"),
    **_of(mutations.odd, "state.safetensors"),
}
_ITERATION = "stored/iter_0000005"
_LATEST = "stored/latest_checkpointed_iteration.txt"
_STORED = {
    **_of(mutations.json_file, "described/config.json"),
    **_of(mutations.pickled, f"{_ITERATION}/.metadata"),
    **_of(mutations.spliced, f"{_ITERATION}/.metadata", f"{_ITERATION}/common.pt"),
    **_of(mutations.raw, f"{_ITERATION}/.metadata", f"{_ITERATION}/__0_0.distcp", f"{_ITERATION}/common.pt", _LATEST),
    **_of(mutations.odd, *_in(_ITERATION, ".metadata", "__0_0.distcp", "common.pt"), _LATEST),
    **_of(mutations.saved, _ITERATION),
}
_BEGUN = {
    **_of(mutations.journal, "out.partial/.done-0-of-1"),
    **_of(mutations.raw, "out.partial/.plan", "out.partial/.complete"),
    **_of(mutations.resized, "out.partial/new/a.safetensors", "out.partial/new/b.safetensors"),
    **_of(mutations.odd, *_in("out.partial", "new", "new/a.safetensors", ".plan", ".done-0-of-1", ".complete")),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A public entry.

    Args:
        run: runs it on a copy of the inputs.
        changes: what the inputs can meet: name → the change, and the file.
        needs: the inputs that it reads.
        prepare: what is made of them before the change.
    """

    run: Callable[[Path], None]
    changes: Mapping[str, tuple[Change, str]]
    needs: tuple[str, ...]
    prepare: Change = _as_it_is


_scheme = _one_of("schemes", "quantized")
_of_modelopt = _one_of("modelopt", "quantized")
ENTRIES: Mapping[str, Entry] = {
    "verify": Entry(_verify, _QUANTIZED, ("quantized",)),
    "verify, every scheme": Entry(_verify, _OF_A_SCHEME, ("schemes",), _scheme),
    "repair": Entry(_repair, _QUANTIZED, ("quantized",)),
    "repair, every scheme": Entry(_repair, _OF_A_SCHEME, ("schemes",), _scheme),
    "verify, ModelOpt's format": Entry(_verify, _OF_MODELOPT, ("modelopt",), _of_modelopt),
    "verify reference=directory": Entry(_verify_against, {**_QUANTIZED, **_PLAIN}, ("quantized", "plain")),
    "verify reference=state": Entry(_verify_state, {**_QUANTIZED, **_STATE}, ("quantized", "state.safetensors")),
    "quantize": Entry(_quantize, _PLAIN, ("plain",)),
    "quantize quant_state=": Entry(_quantize_with_state, {**_STATE, **_PLAIN}, ("plain", "state.safetensors")),
    "quantize, from every format": Entry(_quantize_again, _DECLARED, ("foreign",), _one_of("foreign", "plain")),
    "quantize, from every scheme": Entry(_quantize_again, _ALONE, ("schemes",), _one_of("schemes", "plain")),
    "quantize, begun before": Entry(_quantize_on, _BEGUN, ("plain",), _begin),
    "process_file": Entry(
        _file_by_file, {name: each for name, each in _PLAIN.items() if "a.safetensors" in name}, ("plain",)
    ),
    "report": Entry(_report, {**_QUANTIZED, **_PLAIN}, ("quantized", "plain")),
    "report, every scheme": Entry(_report_alone, _OF_A_SCHEME, ("schemes", "wide"), _scheme),
    "report, ModelOpt's format": Entry(_report_alone, _OF_MODELOPT, ("modelopt", "wide"), _of_modelopt),
    "read_hf_model": Entry(_describe, _CONFIG, ("described",)),
    "read_hf_model, every family": Entry(_describe, _CONFIG, ("families",), _one_of("families", "described")),
    "read for import": Entry(_read_weights, _QUANTIZED, ("quantized",)),
    "read for import, every scheme": Entry(_read_weights, _OF_A_SCHEME, ("schemes",), _scheme),
    "read for import, ModelOpt's format": Entry(_read_weights, _OF_MODELOPT, ("modelopt",), _of_modelopt),
    "import": Entry(_import, _QUANTIZED, ("quantized",)),
    "import, every scheme": Entry(_import, _OF_A_SCHEME, ("schemes",), _scheme),
    "runtime": Entry(_runtime, _QUANTIZED, ("quantized",)),
    "runtime, every scheme": Entry(_runtime, _OF_A_SCHEME, ("schemes",), _scheme),
    "export": Entry(_export, _STORED, ("described", "stored")),
    "export without hf=": Entry(_identify, _STORED, ("described", "stored")),
}


_SECRET = b'{"a secret": "of the user\'s"}'


def run_case(inputs: Path, root: Path, entry: str, random: Random, *, changed: bool = True) -> Outcome:
    """Changes a copy of the inputs and runs an entry on it; without a change if `changed` is False.

    Args:
        root: where the copy is made.
    """
    asked, scratch = ENTRIES[entry], root / mutations.SCRATCH
    (root / mutations.OUTSIDE).write_bytes(_SECRET)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    for each in asked.needs:
        copy = shutil.copytree if (inputs / each).is_dir() else shutil.copy2
        copy(inputs / each, scratch / each)
    asked.prepare(scratch, random)
    possible = {name: each for name, each in asked.changes.items() if os.path.lexists(scratch / each[1])}
    name = random.choice(sorted(possible))
    change, file = possible[name]
    if changed:
        change(scratch / file, random)
    try:
        with _limited():
            asked.run(scratch)
        _nothing_is_outside(root)
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


def _weights(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.glob("*.safetensors")}


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


def _nothing_is_outside(root: Path) -> None:
    """Nothing was read or written behind a link that leads out of the inputs."""
    if (root / mutations.OUTSIDE).read_bytes() != _SECRET or len(list(root.iterdir())) != _AT_THE_TOP:
        raise Silent("something outside was written")
    for file in (root / mutations.SCRATCH / "out").rglob("*"):
        if file.is_file() and _SECRET in file.read_bytes():
            raise Silent(f"{file.name} holds what lies outside")


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
