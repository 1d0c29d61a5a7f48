"""A file in memory, which another program may cut short meanwhile.

Weights are read in the mapped file: copying them would take as long as quantizing them. But reading behind the end of a
file that became shorter, or from a disk that fails, is a SIGBUS, which kills the process without a word. While files
are mapped, a handler of that signal puts zeros in place of what is gone and marks the file; `MappedFile.check`, asked
after the bytes were used, raises the error.

The mapping needs no open file, so a checkpoint may have more files than a process may open.
"""

import ctypes
import mmap
import signal
import threading
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amaxbridge.mappings.errors import CheckpointError

_SI_ADDR = 16  # offset of the faulting address in siginfo_t, on Linux with 64 bits
_SA_SIGINFO, _SA_NODEFER = 4, 0x40000000
_MAP_PRIVATE_FIXED_ANONYMOUS = 0x02 | 0x10 | 0x20


class MappedFile:
    """All bytes of a file, as they are on the disk when they are used.

    Args:
        file: the open file; it may be closed afterwards.
        size: how many bytes it has, as its reader found when it decided what lies where.
        path: its path, for messages.

    Raises:
        RuntimeError: the file has fewer bytes than that by now.
    """

    def __init__(self, file: int, size: int, path: Path) -> None:
        self._path = path
        self._size = size
        # by the descriptor: the path may lead to another file by now
        self._bytes = torch.from_file(f"/proc/self/fd/{file}", shared=False, size=size, dtype=torch.uint8)
        self._begin = self._bytes.data_ptr()
        self.gone = False
        """True once bytes were asked for that the file does not have any more."""
        _guard().watch(self)

    def look(self, begin: int, nbytes: int) -> Tensor:
        """A part of the file as uint8, without a copy. The kernel is asked to read ahead."""
        start = begin - begin % mmap.PAGESIZE
        self._advise(start, begin + nbytes, mmap.MADV_WILLNEED)
        return self._bytes[begin : begin + nbytes]

    def forget(self, begin: int, nbytes: int) -> None:
        """Drops these pages from the process's memory; they stay in the page cache."""
        start = begin + -begin % mmap.PAGESIZE
        self._advise(start, (begin + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_DONTNEED)

    def check(self) -> None:
        """Raises CheckpointError if bytes that were looked at are not those of the file."""
        if self.gone:
            raise CheckpointError(
                f"{self._path} became shorter while it was read, or the disk failed: copy the file again, and leave it "
                "as it is until the command ends"
            )

    def fill(self, address: int) -> bool:
        """Puts zeros in place of what is gone, from the page of `address` on; False for an address of another's."""
        if not self._begin <= address < self._begin + self._size:
            return False
        page = address - address % mmap.PAGESIZE
        self.gone = True
        length = self._begin + self._size - page
        writable = mmap.PROT_READ | mmap.PROT_WRITE
        return bool(_libc().mmap(page, length, writable, _MAP_PRIVATE_FIXED_ANONYMOUS, -1, 0) == page)

    def _advise(self, start: int, end: int, advice: int) -> None:
        if start < end:
            _libc().madvise(self._begin + start, end - start, advice)


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    size, number = ctypes.c_size_t, ctypes.c_int
    libc.madvise.argtypes = [size, size, number]
    libc.mmap.argtypes, libc.mmap.restype = [size, size, number, number, number, ctypes.c_long], size
    return libc


class _SigAction(ctypes.Structure):
    """`struct sigaction` of glibc and musl."""

    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


class _Guard:
    """The handler of SIGBUS while files are mapped. Faults elsewhere go to the handler that was there before.

    The signal comes at the very instruction that reads, in a loop over numbers, so the handler may run Python.
    """

    def __init__(self) -> None:
        self._files: weakref.WeakSet[MappedFile] = weakref.WeakSet()
        self._mutex = threading.RLock()  # a file may be collected, and so left, while another is watched
        self._before = _SigAction()
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(self._handle)
        self._address = ctypes.cast(self._function, ctypes.c_void_p).value

    def watch(self, file: MappedFile) -> None:
        """Handles faults in this file for as long as it lives."""
        with self._mutex:
            self._files.add(file)
            weakref.finalize(file, self._leave).atexit = False
            now = _SigAction()
            _libc().sigaction(signal.SIGBUS, None, ctypes.byref(now))
            if now.handler != self._address:
                self._before = now
                ours = _SigAction(self._address, flags=_SA_SIGINFO | _SA_NODEFER)
                _libc().sigaction(signal.SIGBUS, ctypes.byref(ours), None)

    def _leave(self) -> None:
        with self._mutex:
            now = _SigAction()
            _libc().sigaction(signal.SIGBUS, None, ctypes.byref(now))
            if not set(self._files) and now.handler == self._address:  # the one that leaves may still be in the set
                _libc().sigaction(signal.SIGBUS, ctypes.byref(self._before), None)

    def _handle(self, number: int, info: int, context: int) -> None:
        address = ctypes.c_size_t.from_address(info + _SI_ADDR).value
        if not any(file.fill(address) for file in list(self._files)):
            _libc().sigaction(signal.SIGBUS, ctypes.byref(self._before), None)  # the instruction faults again there


_guard = cache(_Guard)
