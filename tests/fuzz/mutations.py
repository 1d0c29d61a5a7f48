"""Ways to change an input, each with what the file means in view: JSON at any field, headers, bytes, pickles.

Every mutation draws from a `random.Random`, so a seed repeats it, and Hypothesis can give its own.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

OUTSIDE = "outside"
"""A file beside the directory of the inputs, to which nothing may lead."""
SCRATCH = "scratch"
"""The directory of the inputs."""

_DEEP = "@@deep@@"  # replaced in the text: Python could not build it
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 65536, 2**31, 2**63, 10**30, 10**400, -(2**63), 0.0, -0.0, 0.5, 1e308,
    float("nan"), float("inf"), float("-inf"), "", "x", "0", "Linear", "re:(", "re:.*", "re:(a+)+$",
    "re:" + "(.*)" * 40, "\ud800", "\x00", "\x1b[31m", "../x.safetensors", "/etc/passwd", "a" * 3000, "<script>",
    [], [None], [[]], [1, "a", {}], [0, -1], [2**62, 2**62], ["Linear", 3], {}, {"a": 1}, {"": None},
    {"weight_map": {}}, _DEEP, "BF16", "F64", "I64", "F8_E4M3", "nvfp4", "pack-quantized", "float",
    "int", "tensor_group",
)  # fmt: skip


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        found += _paths(each, (*at, key))
    return found


def mutate_json(value: Any, random: Random) -> str:
    """The text of a JSON value with one to three changes."""
    made = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        made = _mutate_once(made, random)
    text = json.dumps(made)
    text = text.replace(
        json.dumps(_DEEP), "[" * 100 + "]" * 100 if random.random() < 0.5 else "[" * 20_000 + "]" * 20_000
    )
    if random.random() < 0.05 and ":" in text:  # a key twice
        first = text.index("{") + 1
        text = f"{text[:first]}{text[first:].partition(',')[0].rstrip('}')}, {text[first:]}"
    return text


def _mutate_once(value: Any, random: Random) -> Any:
    path = random.choice(_paths(value))
    if not path:
        return random.choice(VALUES) if random.random() < 0.1 else value
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    match random.randrange(6):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[str(random.choice(VALUES))[:50]] = parent.pop(key)
        case 2 if isinstance(parent, dict):
            other = random.choice(list(parent))
            parent[key], parent[other] = parent[other], parent[key]
        case 3 if type(parent[key]) is int:
            parent[key] += random.choice((-1, 1, -parent[key], parent[key], 2**31, 10**9))
        case _:
            parent[key] = random.choice(VALUES)
    return value


def json_file(file: Path, random: Random) -> None:
    """Changes fields of a JSON file."""
    text = mutate_json(json.loads(file.read_bytes()), random)
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def header(file: Path, random: Random) -> None:
    """Changes fields of a safetensors header; the tensors stay where they are."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = mutate_json(json.loads(data[8 : 8 + length]), random).encode("utf-8", "surrogatepass")
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def state_metadata(file: Path, random: Random) -> None:
    """Changes the JSON text inside the metadata of a file of quantizer state."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    content = json.loads(data[8 : 8 + length])
    key = "amaxbridge.quant_state"
    content["__metadata__"][key] = mutate_json(json.loads(content["__metadata__"][key]), random)
    text = json.dumps(content).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def raw(file: Path, random: Random) -> None:
    """Changes bytes: flips, cuts, repeats, empties."""
    data = bytearray(file.read_bytes())
    match random.randrange(7):
        case 0:
            data = data[: random.randrange(len(data) + 1)]
        case 1:
            data += bytes(random.randrange(256) for _ in range(random.randrange(1, 64)))
        case 2:
            data = bytearray()
        case 3:
            data[:8] = struct.pack(
                "<Q", random.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(data), max(len(data) - 8, 0)))
            )
        case 4:
            at = random.randrange(len(data) or 1)
            data[at:at] = data[: random.randrange(64)]
        case _:
            for _ in range(random.randrange(1, 16)):
                data[random.randrange(len(data))] = random.choice((0, 255, 127, random.randrange(256)))
    file.write_bytes(data)


def values(file: Path, random: Random) -> None:
    """Overwrites the numbers of some tensors: NaN, infinities, zeros, all bits."""
    data = bytearray(file.read_bytes())
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(random.randrange(1, 6)):
        at, count = random.randrange(begin, len(data)), random.randrange(1, 256)
        pattern = random.choice((b"\x00", b"\xff", b"\x7f\x80", b"\xc0\x7f", b"\x80", b"\x7e"))
        data[at : at + count] = (pattern * count)[: len(data[at : at + count])]
    file.write_bytes(data)


def odd(file: Path, random: Random) -> None:
    """Puts something else in the place of a file: a directory, a pipe, a link that leads nowhere, in a circle, out."""
    size = file.stat().st_size
    outside = next(each for each in file.parents if each.name == SCRATCH).with_name(OUTSIDE)
    kind = random.randrange(2 if file.is_dir() else 0, 10)
    if kind == 0:  # as long as before, and no bytes in it
        os.truncate(file, 0)
        os.truncate(file, size)
        return
    if kind == 1:  # larger than any memory; takes no room on the disk
        with contextlib.suppress(OSError):
            os.truncate(file, 1 << 43)
        return
    moved = file.with_name(f"moved-{file.name}")
    file.rename(moved)
    match kind:
        case 2:
            file.mkdir()
        case 3:
            os.mkfifo(file)
        case 4:
            file.symlink_to("nowhere")
        case 5:
            file.symlink_to(file.name)
        case 6:
            file.symlink_to(random.choice(("/dev/zero", "/proc/self/maps", outside, outside, "..", ".")))
        case 7:
            file.symlink_to(f"{file.name}.2")
            file.with_name(f"{file.name}.2").symlink_to(file.name)
        case 8:
            os.mknod(file, stat.S_IFSOCK | 0o600)
        case _:
            file.symlink_to(moved.name)


def journal(file: Path, random: Random) -> None:
    """Damages a journal as a crash would: cut short, lines lost, doubled or full of zeros, bytes of another file."""
    lines = file.read_bytes().splitlines(keepends=True)
    match random.randrange(6):
        case 0:
            file.write_bytes(b"".join(lines)[: random.randrange(1 + sum(map(len, lines)))])
            return
        case 1:
            lines = [line for line in lines if random.random() < 0.5]
        case 2:
            lines += lines
        case 3:
            lines.insert(
                random.randrange(len(lines) + 1), bytes(random.randrange(1, 5000)) + b"\n" * random.randrange(2)
            )
        case 4:
            lines.insert(0, mutate_json({"a": [1, "b"]}, random).encode("utf-8", "surrogatepass") + b"\n")
        case _:
            lines.insert(0, bytes(random.randrange(256) for _ in range(64)) + b"\n")
    file.write_bytes(b"".join(lines))


def resized(file: Path, random: Random) -> None:
    """Cuts a file, or makes it longer."""
    size = file.stat().st_size
    os.truncate(file, random.choice((0, 7, 8, size // 2, size - 1, size + 1, 2 * size)))


def card(file: Path, random: Random) -> None:
    """Changes the metadata block of a model card."""
    block = random.choice(
        (
            "tags: 3", "tags: [[a], {b: c}]", "1: 2", "- a\n- b", "a: &a [*a]", "tags: !!python/object:os.system x",
            "{", "\t",
            "license: [" * 300, "base_model: {a: b}", "a: .nan", "language: 2024-01-01", "? [a]\n: b", "x: \x00", "",
            "a: &a [1,1]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]", "model-index: 3", "tags: null",
        )
    )  # fmt: skip
    file.write_text(f"---\n{block}\n---\n# x\n" + "<!-- amaxbridge -->" * random.choice((0, 1, 5000)))


def pickled(file: Path, random: Random) -> None:
    """Changes `.metadata` as an object: attributes and entries at any place."""
    value = pickle.loads(file.read_bytes())
    for _ in range(random.choice((1, 1, 2))):
        _mutate_object(value, random)
    file.write_bytes(pickle.dumps(value, protocol=random.choice((2, 4, 5))))


_PROGRAMS = (
    b"})" + b"2\x86" * 60 + b"Ns",  # a key that doubles
    b"\x8f()" + b"2\x86" * 60 + b"\x90",
    b"ccollections\nOrderedDict\n](()" + b"2\x86" * 60 + b"Nte\x85R",
    b"c_codecs\nencode\nX\x00\x00\x10\x00" + b"a" * (1 << 20) + b"X\x06\x00\x00\x00latin1\x86R",
    b"](" + b"N" * 10_000 + b"e" + b"2\x85" * 10_000,
    b"\x8b\x00\x00\x10\x00" + b"\x7f" * (1 << 20) + b"}2Ns",
    b")" + b"\x85" * 100_000,
    b"]" * 100_000 + b"a" * 99_999,
)


def spliced(file: Path, random: Random) -> None:
    """Puts a program before a pickle, bare or in an archive, that would keep an unpickler busy; sometimes alone."""
    program = random.choice(_PROGRAMS) + random.choice((b"0", b"", b"."))
    content = file.read_bytes()
    if not content.startswith(b"PK"):
        file.write_bytes(content[:2] + program + content[2:])
        return
    made, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(content))
    with zipfile.ZipFile(made, "w") as archive:
        for each in source.infolist():
            data = source.read(each)
            is_pickle = each.filename.endswith("data.pkl")
            archive.writestr(each.filename, data[:2] + program + data[2:] if is_pickle else data)
    file.write_bytes(made.getvalue())


def _mutate_object(value: Any, random: Random) -> None:
    """Walks down from an object to a random attribute or entry, and replaces it."""
    for _ in range(8):
        slots = _slots(value)
        if not slots:
            return
        get, put = random.choice(slots)
        inner = get()
        if random.random() < 0.35 or not _slots(inner):
            plain = [each for each in VALUES if each != _DEEP]
            put(
                random.choice(
                    (*plain, (), (-1,), (2**62,), (0, 0), b"x", copy.copy(value), inner, random.choice(plain))
                )
            )
            return
        value = inner


def _slots(value: Any) -> list[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """How to read and to replace each attribute or entry of an object."""
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        keys = list(getattr(value, "__dict__", ()))

        def write(key: str, new: Any) -> None:
            object.__setattr__(value, key, new)

        return [(lambda k=key: getattr(value, k), lambda new, k=key: write(k, new)) for key in keys]
    return [(lambda k=key: value[k], lambda new, k=key: value.__setitem__(k, new)) for key in keys]


def saved(iteration: Path, random: Random) -> None:
    """Writes the checkpoint anew, with other arguments or another configuration of its quantizers."""
    from amaxbridge.bridge.hf import read_hf_model
    from tests.fuzz.inputs import ONE, arguments_of, save_stored

    hf = read_hf_model(iteration.parents[1] / "described")
    arguments, settings = arguments_of(hf), {"weight_quantizer": dict(ONE), "input_quantizer": dict(ONE)}
    _mutate_object(random.choice((arguments, arguments, settings)), random)
    for file in iteration.iterdir():
        file.unlink()
    save_stored(iteration, hf, arguments, settings)
