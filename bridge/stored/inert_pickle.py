"""Untrusted pickles, read as data: nothing is imported, called or constructed.

Megatron, ModelOpt and Transformer Engine pickle what is not a tensor, and a pickle may name any function to be called.
`read_pickle` walks the opcodes itself. Containers, numbers, strings and torch dtypes keep their types; a global
becomes a `Named`, and an object that the pickle would have constructed becomes a `Made`. A caller looks for what it
knows in the result, and ignores or refuses the rest. Sizes are bounded, so that a small file cannot grow without end.

Opcodes: pickletools of the standard library. Archive layout: torch.save since 1.6, a zip file with one `data.pkl`.
"""

import io
import pickletools
import zipfile
import zlib
from collections.abc import Iterator
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
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class NotReadable(ValueError):
    """The bytes are not a pickle, are damaged, or exceed the limits."""


@dataclass(frozen=True, slots=True)
class Named:
    """A class or function that a pickle names. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


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


_ORDERED_DICT, _SIZE = Named("collections", "OrderedDict"), Named("torch", "Size")
_PERSISTENT = Named("", "persistent_load")
_HASHED = (str, bytes, int, float, bool, type(None), torch.dtype, Named, Made)  # by value, or by identity


def read_pickle(data: bytes) -> Any:
    """The value of a pickle; see the module.

    Raises:
        NotReadable: the pickle is incomplete or exceeds the limits.
    """
    if len(data) > _MOST_BYTES:
        raise NotReadable(f"{len(data):,} bytes, more than any state has")
    try:
        value = _Machine().run(data)
    except NotReadable:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError, MemoryError) as error:
        raise NotReadable(f"not a whole pickle: {error}") from error
    _check_expanded(value)
    return value


def read_archive(data: bytes) -> Any:
    """As `read_pickle`, for a file of `torch.save`. A state that is one byte tensor becomes its bytes.

    Raises:
        NotReadable: the file is of another kind, or exceeds the limits.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            paths = {PurePosixPath(each.filename): each for each in archive.infolist()}
            root = next((path.parent for path in paths if path.name == "data.pkl"), None)
            if root is None:
                raise NotReadable("not written by torch.save: there is no data.pkl")

            def read(path: PurePosixPath) -> bytes:
                if path not in paths or paths[path].file_size > _MOST_BYTES:
                    raise NotReadable(f"{path} is missing, or larger than any state")
                return archive.read(paths[path])

            value = read_pickle(read(root / "data.pkl"))
            inner = value[0] if isinstance(value, list) and len(value) == 1 else value
            key = _byte_tensor(inner)
            return value if key is None else read(root / "data" / key)
    except NotReadable:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise NotReadable(f"not written by torch.save: {error}") from error


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
    """The stack machine that runs pickles. A set becomes a list, an OrderedDict a dict."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name == "STOP":
                return self._stack.pop()
            if count > 2 * _MOST_VALUES:
                raise NotReadable("it has too many opcodes")
            self._step(opcode.name, argument)
        raise NotReadable("it has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case _ if name in _LITERALS:
                stack.append(argument)
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                self._marked.append(stack)
                self._stack = []
            case "POP_MARK":
                self._since_mark()
            case "POP":
                self._pop(1)
            case "DUP":
                stack.append(stack[-1])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(name[-1]))))
            case "TUPLE" | "LIST" | "FROZENSET" | "DICT":
                self._collect(name)
            case "APPEND":
                _extend(stack[-2], self._pop(1))
            case "APPENDS" | "ADDITEMS":
                values = self._since_mark()
                _extend(self._stack[-1], values)
            case "SETITEM":
                _set_items(stack[-3], self._pop(2))
            case "SETITEMS":
                values = self._since_mark()
                _set_items(self._stack[-1], values)
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self._memo[len(self._memo) if argument is None else argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(_named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_named(*self._pop(2)))
            case "REDUCE" | "NEWOBJ":
                stack.append(_make(*self._pop(2)))
            case "NEWOBJ_EX":
                by, arguments, keywords = self._pop(3)
                stack.append(Made(by, (arguments, keywords)))
            case "OBJ" | "INST":
                values = self._since_mark()
                by = _named(*argument.split(" ", 1)) if name == "INST" else values.pop(0)
                self._stack.append(_make(by, tuple(values)))
            case "PERSID" | "BINPERSID":
                stack.append(Made(_PERSISTENT, argument if name == "PERSID" else self._pop(1)[0]))
            case "BUILD":
                _give_state(stack[-2], self._pop(1)[0])
            case _:
                raise NotReadable(f"opcode {name}")

    def _collect(self, name: str) -> None:
        values = self._since_mark()
        made: Any = tuple(values) if name == "TUPLE" else values
        if name == "DICT":
            made = {}
            _set_items(made, values)
        self._stack.append(made)

    def _since_mark(self) -> list[Any]:
        found, self._stack = self._stack, self._marked.pop()
        return found

    def _pop(self, count: int) -> list[Any]:
        if count > len(self._stack):
            raise NotReadable("it takes from an empty stack")
        found = self._stack[-count:]
        del self._stack[-count:]
        return found


def _named(module: str, name: str) -> Any:
    if not isinstance(module, str) or not isinstance(name, str):
        raise NotReadable("a global without a name")
    return _DTYPES[name] if module == "torch" and name in _DTYPES else Named(module, name)


def _make(by: Any, arguments: Any) -> Any:
    if by == _ORDERED_DICT and arguments == ():
        return {}
    if by == _SIZE and isinstance(arguments, tuple) and len(arguments) == 1 and isinstance(arguments[0], tuple | list):
        return tuple(arguments[0])
    match by, arguments:
        case Named("_codecs", "encode"), (str(text), "latin1"):  # bytes, in protocols without an opcode for them
            return text.encode("latin1")
    return Made(by, arguments)


def _give_state(target: Any, state: Any) -> None:
    if not isinstance(target, Made):
        raise NotReadable("attributes of a plain value")
    target.state = state


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target += values
    else:
        _set_items(target, [each for item in enumerate(values, len(target.items)) for each in item])


def _set_items(target: Any, flat: list[Any]) -> None:
    """Adds items from alternating keys and values. Hashing a key must not walk through its content."""
    items = target.items if isinstance(target, Made) else target
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        parts = key if isinstance(key, tuple) else (key,)
        if not isinstance(items, dict) or not all(isinstance(part, _HASHED) for part in parts):
            raise NotReadable(f"an item with a {type(key).__name__} as its key")
        items[key] = value
