"""The compiled loops without their compiler: numba makes machine code once, and later processes load that alone.

numba is half a second of imports and 100 MB of memory; LLVM, which loads what it has made, is a tenth of that. So the
object code of each function is kept in the user's cache, under a name that tells for which processor, from which
sources and by which versions it was made. Where nothing can be kept, it is made in every process.

What is kept is the function as numba's own code calls it: a pointer to what it returns, one to an error, then the
arguments, an array as the members of its struct (numba's `ArrayModel`). It refers to nothing outside, of Python or of
numba, which is checked when it is made; so it runs without Python's lock.
"""

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from llvmlite import binding

_Signature = tuple[str, ...]
_LIBC = ("llvm.", "mem")  # what object code may call: LLVM's intrinsics, memset and the like
_SCALARS: dict[type, tuple[str, Any]] = {
    bool: ("boolean", ctypes.c_bool),
    int: ("int64", ctypes.c_int64),
    np.float32: ("float32", ctypes.c_float),
}
_loading = Lock()  # LLVM is entered by one thread at a time


class Loop:
    """A function that numba can compile, called without numba. Threads may share it.

    Args:
        module: beside this file; imported where there is something to compile.
        name: of a function of it that is `njit` without NRT.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        self._loaded: dict[_Signature, Any] = {}
        self._engines: list[Any] = []  # they own the code

    def __call__(self, *arguments: Any) -> int:
        """Calls it with contiguous arrays, `int`, `bool` and `np.float32`; returns its unsigned integer, or 0."""
        signature = tuple(map(_type_of, arguments))
        with _loading:
            if signature not in self._loaded:
                self._loaded[signature] = self._load(signature)
        returned, error = ctypes.c_uint64(), ctypes.c_void_p()
        passed = [member for argument in arguments for member in _members(argument)]
        status = self._loaded[signature](ctypes.byref(returned), ctypes.byref(error), *passed)
        assert status == 0, f"{self._name} ended with status {status}"
        return returned.value

    def _load(self, signature: _Signature) -> Any:
        key = hashlib.sha256(repr((_environment(), self._module, self._name, signature)).encode()).hexdigest()
        code = _kept(key, lambda: _compiled(self._module, self._name, signature))
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
        engine.add_object_file(binding.ObjectFileRef.from_data(code))
        engine.finalize_object()
        self._engines.append(engine)
        return ctypes.CFUNCTYPE(ctypes.c_int32)(engine.get_function_address(self._name))


def cache_directory() -> Path:
    """Where machine code is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "amaxbridge"


def _type_of(argument: Any) -> str:
    """As numba writes it."""
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        return f"{argument.dtype}[{':,' * (argument.ndim - 1)}::1]"
    return _SCALARS[type(argument)][0]


def _members(argument: Any) -> list[Any]:
    """What is passed for an argument."""
    if isinstance(argument, np.ndarray):
        sizes = (argument.size, argument.itemsize, argument.ctypes.data, *argument.shape, *argument.strides)
        return [None, None, *map(ctypes.c_int64, sizes)]  # no owner to count references of
    return [_SCALARS[type(argument)][1](argument)]


@cache
def _machine() -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    cpu, features = binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
    target = binding.Target.from_default_triple()
    return target.create_target_machine(cpu=cpu, features=features, opt=3, codemodel="jitdefault", jit=True)


@cache
def _environment() -> tuple[str, ...]:
    """What else decides the machine code."""
    sources = sorted(Path(__file__).parent.glob("*_loops.py"))
    text = b"".join(path.read_bytes() for path in (*sources, Path(__file__)))
    machine = _machine()
    versions = (metadata.version("numba"), metadata.version("llvmlite"))
    features = binding.get_host_cpu_features().flatten()
    return *versions, machine.triple, binding.get_host_cpu_name(), features, hashlib.sha256(text).hexdigest()


def _kept(key: str, make: Callable[[], bytes]) -> bytes:
    """The object code under a key: from the cache, or made, and put there if that can be."""
    path = cache_directory() / f"{key}.o"
    try:
        digest, code = (content := path.read_bytes())[:32], content[32:]
        if hashlib.sha256(code).digest() == digest:
            return code
    except OSError:
        pass
    code = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
    except OSError:
        pass
    return code


def _compiled(module: str, name: str, signature: _Signature) -> bytes:
    """Object code of a function and what it calls, all else that numba puts beside it left out."""
    from numba.core import sigutils

    function = getattr(import_module(f"{__package__}.{module}"), name)
    types, _ = sigutils.normalize_signature(f"({', '.join(signature)})")
    function.compile(types)
    symbol = function.overloads[types].fndesc.llvm_func_name
    llvm = binding.parse_assembly(function.inspect_llvm(types))
    for each in llvm.functions:
        if not each.is_declaration:
            each.linkage = "external" if each.name == symbol else "internal"
    llvm.get_function(symbol).name = name
    passes = binding.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.add_strip_dead_prototype_pass()
    passes.run(llvm, binding.create_pass_builder(_machine(), binding.create_pipeline_tuning_options()))
    outside = [each.name for each in llvm.functions if each.is_declaration and not each.name.startswith(_LIBC)]
    assert not outside, f"{name} calls {outside}"
    code: bytes = _machine().emit_object(llvm)
    return code
