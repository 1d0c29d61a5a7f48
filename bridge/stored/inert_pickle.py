"""Untrusted pickles, read as data: nothing is imported, called or constructed.

Megatron, ModelOpt and Transformer Engine pickle what is not a tensor, and a pickle may name any function to be called.
`read_pickle` walks the opcodes itself. Containers, numbers, strings and torch dtypes keep their types; a global
becomes a `Named`, and an object that the pickle would have constructed becomes a `Made`. A caller looks for what it
knows in the result, and ignores or refuses the rest. Sizes are bounded, so that a small file cannot grow without end;
and nothing takes the C stack or time by what a value contains, as hashing a tuple of tuples does in an unpickler.

Opcodes: pickletools of the standard library. Archive layout: torch.save since 1.6, a zip file with one `data.pkl`.
"""

import io
import pickletools
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import torch

_MOST_BYTES = 64 << 20
_MOST_VALUES = 1 << 21  # a container counts at each of its places
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_LITERALS = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
)  # fmt: skip
_LONGEST_KEY, _LARGEST_KEY = 16, 1 << 128


class NotReadable(ValueError):
    """The bytes are not a pickle, are damaged, or exceed the limits."""


@dataclass(frozen=True, slots=True)
class Named:
    """A class or function that a pickle names. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        name = f"{self.module}.{self.name}"
        return name if name.isprintable() else ascii(name)


@dataclass(eq=False, slots=True)
class Made:
    """An object that a pickle would have constructed.

    Args:
        by: the class or function.
        arguments: the arguments of its call.
        state: the state set afterwards, None for none.
        items: the items added: those of a dict, or those of a list by position.
    """

    by: Any
    arguments: Any
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


_PLAIN = {"OrderedDict": "collections", "Size": "torch", "encode": "_codecs"}
_ORDERED_DICT = Named("collections", "OrderedDict")
_MAKERS = [Named("torch._utils", name) for name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")]
_OPCODES_OF_A_TENSOR = 80  # 48 for two dims of a parameter, and two for each further dim
_PERSISTENT = Named("", "persistent_load")
_HASHED = (str, bytes, int, float, bool, type(None), torch.dtype, Named, Made)  # by value, or by identity


def read_pickle(data: bytes) -> Any:
    """The value of a pickle; see the module.

    Raises:
        NotReadable: the pickle is incomplete or exceeds the limits.
    """
    if len(data) > _MOST_BYTES:
        raise NotReadable(f"{len(data):,} bytes, more than any state has")
    value, _ = _run(data, most=2 * _MOST_VALUES)
    _check_expanded(value)
    return value


def read_long_pickle(data: bytes, known: Collection[Named]) -> Any:
    """As `read_pickle`, of any length. The caller bounds what it makes of values that are there many times.

    Args:
        known: the only classes and functions that it may name, beside those of plain values (dtypes, `torch.Size`,
            `OrderedDict`).

    Raises:
        NotReadable: the pickle is incomplete, or names others.
    """
    value, named = _run(data, most=len(data))
    for each in named:
        if isinstance(each, Named) and each not in known and _PLAIN.get(each.name) != each.module:
            raise NotReadable(f"it names {each}")
    return value


def check_tensor_pickle(data: bytes) -> None:
    """Checks the pickle of one tensor in an archive of `torch.save`, before PyTorch loads it.

    PyTorch calls nothing that is unsafe, but it hashes and prints whatever a pickle builds. A tensor takes few opcodes,
    with which nothing large can be built.

    Raises:
        NotReadable: it is another pickle.
    """
    _, named = _run(data, most=_OPCODES_OF_A_TENSOR)
    for each in named:
        is_storage = isinstance(each, Named) and each.module in ("torch", "torch.storage") and "Storage" in each.name
        if isinstance(each, Named) and not is_storage and each not in _MAKERS and each != _ORDERED_DICT:
            raise NotReadable(f"it names {each}")


def _run(data: bytes, *, most: int) -> tuple[Any, Collection[Any]]:
    """The value, and what it names. `most`: number of opcodes."""
    machine = _Machine(most_to_copy=len(data))
    try:
        return machine.run(data, most), machine.named.values()
    except NotReadable:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError, MemoryError) as error:
        raise NotReadable(f"not a whole pickle: {error}") from error


def read_archive(data: bytes) -> Any:
    """As `read_pickle`, for a file of `torch.save`. A state that is one byte tensor becomes its bytes.

    Raises:
        NotReadable: the file is of another kind, or exceeds the limits.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            value, root = pickle_in(archive)
            inner = value[0] if isinstance(value, list) and len(value) == 1 else value
            key = _byte_tensor(inner)
            return value if key is None else _member(archive, root / "data" / key)
    except NotReadable:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise NotReadable(f"not written by torch.save: {error}") from error


def pickle_in(archive: zipfile.ZipFile) -> tuple[Any, PurePosixPath]:
    """The value of the pickle in an archive of `torch.save`, and the directory of its members.

    Raises:
        NotReadable: as `read_archive`. A damaged archive raises what `zipfile` does.
    """
    paths = (PurePosixPath(each.filename) for each in archive.infolist())
    root = next((path.parent for path in paths if path.name == "data.pkl"), None)
    if root is None:
        raise NotReadable("not written by torch.save: there is no data.pkl")
    return read_pickle(_member(archive, root / "data.pkl")), root


def _member(archive: zipfile.ZipFile, path: PurePosixPath) -> bytes:
    found = archive.NameToInfo.get(str(path))
    if found is None or found.file_size > _MOST_BYTES:
        raise NotReadable(f"{path} is missing, or larger than any state")
    if found.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise NotReadable(f"{path} is compressed in another way than any state")
    return archive.read(found)


def is_archive(data: bytes) -> bool:
    """True if `torch.save` wrote the data, False for a bare pickle."""
    return data.startswith(b"PK\x03\x04")


def names_in(value: Any) -> Iterator[str]:
    """The full names of everything that a value would have imported, each once."""
    yield from dict.fromkeys(str(each) for each in _walk(value) if isinstance(each, Named))


def _byte_tensor(value: Any) -> str | None:
    """The key of the storage of a one-dimensional uint8 tensor that is all of its storage; None for anything else."""
    match value:
        case Made(by=Named("torch._utils", "_rebuild_tensor_v2"), arguments=(Made() as stored, 0, (size,), (1,), *_)):
            match stored.arguments:
                case ("storage", Named("torch", "ByteStorage"), str(key), _, count) if count == size and key.isalnum():
                    return key
    return None


def _walk(value: Any) -> Iterator[Any]:
    todo = [value]
    while todo:
        each = todo.pop()
        yield each
        if isinstance(each, dict):
            todo += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple):
            todo += each
        elif isinstance(each, Made):
            todo += [each.by, each.arguments, each.state, each.items]


def _check_expanded(value: Any) -> None:
    """Refuses a value that contains itself, or that would grow without bound when compared or printed."""
    for count, _ in enumerate(_walk(value)):
        if count > _MOST_VALUES:
            raise NotReadable(f"more than {_MOST_VALUES:,} values, or a container that contains itself")


class _Machine:
    """The stack machine that runs pickles. A set becomes a list, an OrderedDict a dict.

    No step takes more time or memory than the bytes that it reads, however large the values are to which they refer:
    keys are hashed in constant time, and no more is copied than the file has bytes.

    Args:
        most_to_copy: the bytes of the file.
    """

    def __init__(self, most_to_copy: int) -> None:
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._left_to_copy = most_to_copy
        self.named: dict[tuple[str, str], Any] = {}

    def run(self, data: bytes, most: int) -> Any:
        stream = io.BytesIO(data)
        for _ in range(most):
            code = stream.read(1)
            if code == b".":
                return self._stack.pop()
            step, read = _BY_CODE.get(code, (None, None))
            if step is None:
                raise NotReadable(f"opcode {code!r}" if code else "it has no end")
            step(self, None if read is None else read(stream))
        raise NotReadable("it has too many opcodes")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def duplicate(self) -> None:
        self._stack.append(self._stack[-1])

    def mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def since_mark(self) -> list[Any]:
        """Takes what was pushed since the last mark."""
        found, self._stack = self._stack, self._marked.pop()
        return found

    def last(self, count: int) -> list[Any]:
        """Takes the last values."""
        if count > len(self._stack):
            raise NotReadable("it takes from an empty stack")
        found = self._stack[-count:]
        del self._stack[-count:]
        return found

    def put(self, place: int | None) -> None:
        self._memo[len(self._memo) if place is None else place] = self._stack[-1]

    def get(self, place: int) -> None:
        self._stack.append(self._memo[place])

    def named_by(self, module: Any, name: Any) -> Any:
        """A dtype of torch, or a `Named`, one object for each name."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise NotReadable("a global without a name")
        if (module, name) not in self.named:
            is_dtype = module == "torch" and name in _DTYPES
            self.named[module, name] = _DTYPES[name] if is_dtype else Named(module, name)
        return self.named[module, name]

    def make(self, by: Any, arguments: Any) -> None:
        is_plain = isinstance(by, Named) and by.name in _PLAIN and by.module == _PLAIN[by.name]
        self._stack.append(self._plain(by, arguments) if is_plain else Made(by, arguments))

    def _plain(self, by: Named, arguments: Any) -> Any:
        """Plain values that pickles make by a call."""
        match by.name, arguments:
            case "OrderedDict", ():
                return {}
            case "OrderedDict", _:
                raise NotReadable("an OrderedDict made from values")
            case "Size", (tuple(size),):
                return size
            case "Size", (list(size),):
                return tuple(self._copied(size))
            case "encode", (str(text), "latin1"):  # bytes, in protocols without an opcode for them
                return self._copied(text).encode("latin1")
        return Made(by, arguments)

    def make_first(self, values: list[Any]) -> None:
        """As `make`; the first value is the class."""
        self.make(values[0], tuple(values[1:]))

    def extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target += values
        elif isinstance(target, Made):
            _set_items(target, [each for item in enumerate(values, len(target.items)) for each in item])
        else:
            raise NotReadable("values added to what is no list")

    def set_items(self, flat: list[Any]) -> None:
        _set_items(self._stack[-1], flat)

    def give_state(self, state: Any) -> None:
        if isinstance(self._stack[-1], dict):
            return  # an OrderedDict with attributes: `_metadata` of a module's state
        if not isinstance(self._stack[-1], Made):
            raise NotReadable("attributes of a plain value")
        self._stack[-1].state = state

    def _copied[T: (str, list[Any])](self, value: T) -> T:
        self._left_to_copy -= len(value)
        if self._left_to_copy < 0:
            raise NotReadable("it copies one value again and again")
        return value


def _set_items(target: Any, flat: list[Any]) -> None:
    """Adds items from alternating keys and values."""
    items = target.items if isinstance(target, Made) else target
    if not isinstance(items, dict):
        raise NotReadable("items added to what is no dict")
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        if not _is_key(key):
            raise NotReadable(f"an item with a {type(key).__name__} as its key")
        items[key] = value


def _is_key(key: Any) -> bool:
    """True if hashing a key takes constant time. Tuples and large numbers are hashed whole, each time anew."""
    if isinstance(key, tuple):
        return len(key) <= _LONGEST_KEY and all(not isinstance(part, tuple) and _is_key(part) for part in key)
    return isinstance(key, _HASHED) and not (isinstance(key, int) and abs(key) > _LARGEST_KEY)


def _with_keywords(by: Any, arguments: Any, keywords: Any) -> Made:
    return Made(by, (arguments, keywords))


def _filled(flat: list[Any]) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    _set_items(made, flat)
    return made


_STEPS: Mapping[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    **dict.fromkeys(_LITERALS, _Machine.push),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_SET": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "MARK": lambda machine, _: machine.mark(),
    "POP_MARK": lambda machine, _: machine.since_mark(),
    "POP": lambda machine, _: machine.last(1),
    "DUP": lambda machine, _: machine.duplicate(),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.last(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.last(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.last(3))),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "FROZENSET": lambda machine, _: machine.push(machine.since_mark()),
    "DICT": lambda machine, _: machine.push(_filled(machine.since_mark())),
    "APPEND": lambda machine, _: machine.extend(machine.last(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "GLOBAL": lambda machine, argument: machine.push(machine.named_by(*argument.split(" ", 1))),
    "STACK_GLOBAL": lambda machine, _: machine.push(machine.named_by(*machine.last(2))),
    "REDUCE": lambda machine, _: machine.make(*machine.last(2)),
    "NEWOBJ": lambda machine, _: machine.make(*machine.last(2)),
    "NEWOBJ_EX": lambda machine, _: machine.push(_with_keywords(*machine.last(3))),
    "OBJ": lambda machine, _: machine.make_first(machine.since_mark()),
    "INST": lambda machine, argument: machine.make(
        machine.named_by(*argument.split(" ", 1)), tuple(machine.since_mark())
    ),
    "PERSID": lambda machine, argument: machine.push(Made(_PERSISTENT, argument)),
    "BINPERSID": lambda machine, _: machine.push(Made(_PERSISTENT, machine.last(1)[0])),
    "BUILD": lambda machine, _: machine.give_state(machine.last(1)[0]),
}
_BY_CODE = {
    opcode.code.encode("latin1"): (_STEPS[opcode.name], None if opcode.arg is None else opcode.arg.reader)
    for opcode in pickletools.opcodes
    if opcode.name in _STEPS
}
