"""Calling compiled loops on numpy arrays without importing numba, which compiled them; see `machine_code`.

The calling convention is numba's: a pointer to the return value, a pointer to an error, then the arguments; an array is
passed as the members of its struct (numba's `ArrayModel`). The interpreter lock is released during the call.

numba may change that convention. `machine_code` notices; numba then calls its functions itself and keeps them in its
own cache. The results are the same.
"""

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module, metadata
from threading import Lock
from typing import Any

import numpy as np

_log = logging.getLogger("amaxbridge")

_Kind = tuple[Any, int]  # dtype and number of dims of an array, Python's type of a scalar
_SCALARS: dict[Any, tuple[str, str, Any]] = {  # Python's type → numba's, LLVM's, C's
    bool: ("boolean", "i8", ctypes.c_bool),
    int: ("int64", "i64", ctypes.c_int64),
    np.float32: ("float32", "float", ctypes.c_float),
}
_RESULTS = ("ptr", "ptr")  # LLVM's types of the pointers to the return value and to an error
_loading = Lock()  # two threads that need the same loop compile it once


class Loop:
    """A function that numba can compile. Threads may share it.

    Args:
        module: a module beside this file; it is imported only if its machine code is not in the cache.
        name: a function in that module, compiled with `e2m1_loops.OPTIONS`.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        self._loaded: dict[tuple[_Kind, ...], Callable[..., int]] = {}

    def __call__(self, *arguments: Any) -> int:
        """Calls the loop with contiguous arrays, `int`, `bool` and `np.float32`; returns its unsigned integer, or 0."""
        kinds = tuple(map(_kind_of, arguments))
        if (function := self._loaded.get(kinds)) is None:
            function = self._load(kinds)
        return function(*arguments)

    def _load(self, kinds: tuple[_Kind, ...]) -> Callable[..., int]:
        from amaxbridge.export.kernels import machine_code  # imports LLVM, which takes 50 ms

        with _loading:
            if kinds not in self._loaded:
                signature = tuple(map(_numba_type, kinds))
                passed = (*_RESULTS, *(each for kind in kinds for each in _llvm_types(kind)))
                try:
                    address = machine_code.address_of(self._module, self._name, signature, passed)
                    self._loaded[kinds] = self._bare(address)
                except machine_code.UnknownCodeError:
                    _say_unknown()
                    self._loaded[kinds] = self._by_numba()
            return self._loaded[kinds]

    def _bare(self, address: int) -> Callable[..., int]:
        """The machine code at an address."""
        function = ctypes.CFUNCTYPE(ctypes.c_int32)(address)

        def call(*arguments: Any) -> int:
            returned, error = ctypes.c_uint64(), ctypes.c_void_p()
            passed = [member for argument in arguments for member in _members(argument)]
            status = function(ctypes.byref(returned), ctypes.byref(error), *passed)
            assert status == 0, f"{self._name} ended with status {status}"
            return returned.value

        return call

    def _by_numba(self) -> Callable[..., int]:
        """numba's own function, kept in numba's own cache where it finds a directory to write to."""
        from numba import njit

        loops = import_module(f"{__package__}.{self._module}")
        function = getattr(loops, self._name).py_func
        try:
            function = njit(**loops.OPTIONS, cache=True)(function)
        except RuntimeError:
            function = njit(**loops.OPTIONS)(function)
        return lambda *arguments: function(*arguments) or 0


@cache
def _say_unknown() -> None:
    """Once, for all loops."""
    _log.warning(
        "numba %s compiles loops otherwise than known: they stay in numba's own cache, and each process starts slower",
        metadata.version("numba"),
    )


def _kind_of(argument: Any) -> _Kind:
    return (argument.dtype, argument.ndim) if isinstance(argument, np.ndarray) else (type(argument), 0)


def _numba_type(kind: _Kind) -> str:
    return f"{kind[0]}[{':,' * (kind[1] - 1)}::1]" if kind[1] else _SCALARS[kind[0]][0]


def _llvm_types(kind: _Kind) -> tuple[str, ...]:
    """LLVM's types of what `_members` passes."""
    return ("ptr", "ptr", "i64", "i64", "ptr", *("i64",) * (2 * kind[1])) if kind[1] else (_SCALARS[kind[0]][1],)


def _members(argument: Any) -> list[Any]:
    """The C values that are passed for one argument."""
    if not isinstance(argument, np.ndarray):
        return [_SCALARS[type(argument)][2](argument)]
    assert argument.flags.c_contiguous
    sizes = (argument.size, argument.itemsize, argument.ctypes.data, *argument.shape, *argument.strides)
    return [None, None, *map(ctypes.c_int64, sizes)]  # no owner to count references of
