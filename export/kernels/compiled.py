"""Compiled loops, called on numpy arrays without numba, which compiled them: see `machine_code`.

A function is called as numba's own code would: with a pointer to what it returns, one to an error, then the arguments,
an array as the members of its struct (numba's `ArrayModel`). No lock of Python's is held meanwhile.
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
_loading = Lock()  # a loop that two threads want is compiled once


class Loop:
    """A function that numba can compile. Threads may share it.

    Args:
        module: beside this file; imported only where its machine code is not kept yet.
        name: of a function in it, compiled with `OPTIONS` of `e2m1_loops`.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        self._loaded: dict[tuple[_Kind, ...], Any] = {}

    def __call__(self, *arguments: Any) -> int:
        """Calls it with contiguous arrays, `int`, `bool` and `np.float32`; returns its unsigned integer, or 0."""
        kinds = tuple(map(_kind_of, arguments))
        if (function := self._loaded.get(kinds)) is None:
            function = self._load(kinds)
        returned, error = ctypes.c_uint64(), ctypes.c_void_p()
        passed = [member for argument in arguments for member in _members(argument)]
        status = function(ctypes.byref(returned), ctypes.byref(error), *passed)
        assert status == 0, f"{self._name} ended with status {status}"
        return returned.value

    def _load(self, kinds: tuple[_Kind, ...]) -> Any:
        from amaxbridge.export.kernels import machine_code  # LLVM, 50 ms, is imported where weights are quantized

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
    """What is passed for an argument."""
    if not isinstance(argument, np.ndarray):
        return [_SCALARS[type(argument)][1](argument)]
    assert argument.flags.c_contiguous
    sizes = (argument.size, argument.itemsize, argument.ctypes.data, *argument.shape, *argument.strides)
    return [None, None, *map(ctypes.c_int64, sizes)]  # no owner whose references are counted
