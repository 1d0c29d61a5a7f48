"""Machine code of the loops: numba makes it once on a machine, later processes load it with LLVM alone.

numba is half a second of imports and 100 MB of memory; LLVM, which loads what it has made, is a tenth of that. The
object code of a function is kept in the user's cache, under a name that tells from which sources, by which versions
and for which processor it was made. Where nothing can be kept, each process makes its own.

The code is what LLVM makes of the text that numba prints for people who want to look at it (`inspect_llvm`), optimized
already. numba promises neither that text nor how its functions are called, so both are checked when code is made: the
function takes exactly the arguments that `compiled` passes, and refers to nothing of Python or numba. What fails either
check is `UnknownCodeError`, and `compiled` then leaves the loop to numba.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from llvmlite import binding

_log = logging.getLogger("amaxbridge")
_FROM_OUTSIDE = ("llvm.", "mem")  # LLVM's own, and memset and the like of the C library
_engines: list[Any] = []  # they own the loaded code, for as long as the process lives


class UnknownCodeError(Exception):
    """This numba or llvmlite does not make code that can be called without it."""


def address_of(module: str, name: str, signature: tuple[str, ...], arguments: tuple[str, ...]) -> int:
    """Loads a function of a module beside this file and returns its address.

    Args:
        signature: the types of its arguments as numba writes them.
        arguments: the types that it is called with as LLVM writes them: pointers to what it returns and to an error,
            then the members of each argument.

    Raises:
        UnknownCodeError: numba's code for it cannot be called so.
    """
    key = hashlib.sha256(repr((_environment(), module, name, signature, arguments)).encode()).hexdigest()
    code = _kept(key, lambda: _compiled(module, name, signature, arguments))
    if not code:
        raise UnknownCodeError(f"numba's code for {name} cannot be called without numba")
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address(name)
    return address


def cache_directory() -> Path:
    """Where machine code is kept; it can be removed at any time."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "amaxbridge"
    except RuntimeError:  # a user without a home; nothing can be kept below this
        return Path(os.devnull)


def _processor() -> tuple[str, str]:
    return binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()


@cache
def _machine() -> Any:
    """LLVM for this processor."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    cpu, features = _processor()
    target = binding.Target.from_default_triple()
    return target.create_target_machine(cpu=cpu, features=features, opt=3, codemodel="jitdefault", jit=True)


@cache
def _environment() -> tuple[str, ...]:
    """What decides the code of every function."""
    sources = [*sorted(Path(__file__).parent.glob("*_loops.py")), Path(__file__)]
    text = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return text, metadata.version("numba"), metadata.version("llvmlite"), _machine().triple, *_processor()


def _kept(key: str, make: Callable[[], bytes]) -> bytes:
    """The code under a key: from the cache, else made, and kept if that can be."""
    path = cache_directory() / f"{key}.o"
    try:
        digest, code = (content := path.read_bytes())[:32], content[32:]
        if hashlib.sha256(code).digest() == digest:  # else a file that was cut short
            return code
    except OSError:
        pass
    code = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete_on_close=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
            file.close()
            os.replace(file.name, path)
    except OSError:  # a cache that cannot be written, or is full, costs time only
        pass
    return code


def _compiled(module: str, name: str, signature: tuple[str, ...], arguments: tuple[str, ...]) -> bytes:
    """As `_object_code`; nothing where numba's code is not as known, so that later processes need not try."""
    try:
        return _object_code(module, name, signature, arguments)
    except UnknownCodeError as error:
        _log.debug("%s", error)
    except (AttributeError, ImportError, LookupError, NameError, RuntimeError, TypeError) as error:
        _log.debug("%s.%s: %s: %s", module, name, type(error).__name__, error)  # a name of numba's or LLVM's has moved
    return b""


def _object_code(module: str, name: str, signature: tuple[str, ...], arguments: tuple[str, ...]) -> bytes:
    """Object code of a function and what it calls; all else that numba puts beside it is left out."""
    from numba.core import sigutils

    function = getattr(import_module(f"{__package__}.{module}"), name)
    types, _ = sigutils.normalize_signature(f"({', '.join(signature)},)")
    function.compile(types)
    symbol = function.overloads[types].fndesc.llvm_func_name
    llvm = binding.parse_assembly(function.inspect_llvm(types))
    for each in llvm.functions:
        if not each.is_declaration:
            each.linkage = "external" if each.name == symbol else "internal"
    entry = llvm.get_function(symbol)
    found = tuple(_opaque(str(each.type)) for each in entry.arguments)
    if found != arguments:
        raise UnknownCodeError(f"{name} takes {', '.join(found)}")
    entry.name = name
    passes = binding.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.add_strip_dead_prototype_pass()
    passes.run(llvm, binding.create_pass_builder(_machine(), binding.create_pipeline_tuning_options()))
    outside = [each.name for each in llvm.functions if each.is_declaration and not each.name.startswith(_FROM_OUTSIDE)]
    if outside:
        raise UnknownCodeError(f"{name} calls {', '.join(outside)}")
    code: bytes = _machine().emit_object(llvm)
    return code


def _opaque(kind: str) -> str:
    """LLVM's name of a type; before LLVM 17 a pointer has the type of what it points to."""
    return "ptr" if kind.endswith("*") else kind
