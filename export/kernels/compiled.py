"""Calling compiled loops on numpy arrays without importing numba, which compiled them; see `machine_code`.

The calling convention is numba's: a pointer to the return value, a pointer to an error, then the arguments; an array is
passed as the members of its struct (numba's `ArrayModel`). The interpreter lock is released during the call.
"""

import ctypes
from threading import Lock
from typing import Any

import numpy as np

_Kind = tuple[Any, int]  # dtype and number of dims of an array, Python's type of a scalar
_SCALARS: dict[Any, tuple[str, Any]] = {
    bool: ("boolean", ctypes.c_bool),
    int: ("int64", ctypes.c_int64),
    np.float32: ("float32", ctypes.c_float),
}
_loading = Lock()  # two threads that need the same loop compile it once


class Loop:
    """A function that numba can compile. Threads may share it.

    Args:
        module: a module beside this file; it is imported only if its machine code is not in the cache.
        name: a function in that module, compiled with `e2m1_loops.OPTIONS`.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        self._loaded: dict[tuple[_Kind, ...], Any] = {}

    def __call__(self, *arguments: Any) -> int:
        """Calls the loop with contiguous arrays, `int`, `bool` and `np.float32`; returns its unsigned integer, or 0."""
        kinds = tuple(map(_kind_of, arguments))
        if (function := self._loaded.get(kinds)) is None:
            function = self._load(kinds)
        returned, error = ctypes.c_uint64(), ctypes.c_void_p()
        passed = [member for argument in arguments for member in _members(argument)]
        status = function(ctypes.byref(returned), ctypes.byref(error), *passed)
        assert status == 0, f"{self._name} ended with status {status}"
        return returned.value

    def _load(self, kinds: tuple[_Kind, ...]) -> Any:
        from amaxbridge.export.kernels import machine_code  # imports LLVM, which takes 50 ms

        with _loading:
            if kinds not in self._loaded:
                address = machine_code.address_of(self._module, self._name, tuple(map(_numba_type, kinds)))
                self._loaded[kinds] = ctypes.CFUNCTYPE(ctypes.c_int32)(address)
            return self._loaded[kinds]


def _kind_of(argument: Any) -> _Kind:
    return (argument.dtype, argument.ndim) if isinstance(argument, np.ndarray) else (type(argument), 0)


def _numba_type(kind: _Kind) -> str:
    return f"{kind[0]}[{':,' * (kind[1] - 1)}::1]" if kind[1] else _SCALARS[kind[0]][0]


def _members(argument: Any) -> list[Any]:
    """The C values that are passed for one argument."""
    if not isinstance(argument, np.ndarray):
        return [_SCALARS[type(argument)][1](argument)]
    assert argument.flags.c_contiguous
    sizes = (argument.size, argument.itemsize, argument.ctypes.data, *argument.shape, *argument.strides)
    return [None, None, *map(ctypes.c_int64, sizes)]  # no owner to count references of
