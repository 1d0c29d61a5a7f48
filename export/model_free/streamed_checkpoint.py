"""A checkpoint on the Hub, read tensor by tensor over HTTP: a model larger than the disk is quantized in one pass.

Headers are fetched first, and everything is planned on them; each part of a tensor is fetched when its turn comes, and
dropped when it is quantized. The commit is fixed at the beginning, so that the files cannot change meanwhile.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]
from torch import Tensor

from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.disk.safetensors_file import SafetensorsFile, StoredTensor, read_header
from amaxbridge.mappings.errors import CheckpointError

_ATTEMPTS = 6
_FIRST_WAIT = 0.25  # seconds; each wait is twice the one before
_MAX_HEADER = 100_000_000

type Fetch = Callable[[int, int], bytes]
"""Begin and end → the bytes between them."""


class StreamedCheckpoint(SafetensorsCheckpoint):
    """The tensors of a model on the Hub.

    Args:
        directory: the snapshot of all its other files.
        name: `OWNER/MODEL`.
        commit: the commit that the snapshot is of.
    """

    def __init__(self, directory: Path, name: str, commit: str) -> None:
        super().__init__(directory)
        self._name, self._commit = name, commit

    def file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            url = hf_hub_url(self._name, name, revision=self._commit)
            self._files[name] = StreamedFile(self.directory / name, fetch=lambda begin, end: _fetch(url, begin, end))
        return self._files[name]

    def _files_of_weights(self) -> list[str]:
        return sorted(name for name in self._listed if name.endswith(".safetensors") and "/" not in name)

    def _is_there(self, file: str) -> bool:
        return file in self._listed

    @cached_property
    def _listed(self) -> frozenset[str]:
        try:
            return frozenset(HfApi().list_repo_files(self._name, revision=self._commit))
        except Exception as error:  # whatever the library for HTTP raises, which depends on the client's version
            raise CheckpointError(f"the Hub does not list the files of {self._name}: {error}") from error


@dataclass(slots=True)
class StreamedFile(SafetensorsFile):
    """A safetensors file elsewhere. Of what was looked at, a part is kept until it is forgotten.

    Args:
        fetch: returns some of its bytes.
    """

    fetch: Fetch = field(kw_only=True, repr=False)
    _kept: dict[tuple[int, int], Tensor] = field(init=False, default_factory=dict, repr=False)
    _mutex: threading.Lock = field(init=False, default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        length = int.from_bytes(self.fetch(0, 8), "little")
        if length > _MAX_HEADER:
            raise CheckpointError(f"{self.path}: a header of {length:,} bytes: it is not safetensors")
        try:
            header = read_header(self.fetch(8, 8 + length))
        except ValueError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        self.metadata = header.metadata
        self.tensors = {name: StoredTensor(self, header.begins[name], spec) for name, spec in header.specs.items()}

    def read(self, begin: int, memory: Tensor) -> None:
        memory.copy_(self._bytes(begin, len(memory)))

    def look(self, begin: int, nbytes: int) -> Tensor:
        at = (begin, begin + nbytes)
        with self._mutex:
            found = self._kept.get(at)
        if found is None:
            found = self._bytes(begin, nbytes)
            with self._mutex:
                self._kept[at] = found
        return found

    def forget(self, begin: int, nbytes: int) -> None:
        with self._mutex:
            for first, last in [*self._kept]:
                if first < begin + nbytes and begin < last:
                    del self._kept[first, last]

    def check(self) -> None:
        """Nothing can be gone: bytes that do not come are an error at once."""

    def check_unchanged(self) -> None:
        """A file of a commit never changes."""

    def close(self) -> None:
        self._kept.clear()

    def _bytes(self, begin: int, nbytes: int) -> Tensor:
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(self.fetch(begin, begin + nbytes)), dtype=torch.uint8)


def _fetch(url: str, begin: int, end: int) -> bytes:
    """Bytes of a file on the Hub, asked for again when the connection breaks.

    Raises:
        CheckpointError: they do not come.
    """
    why: object = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_FIRST_WAIT * 2**attempt)
        try:
            response = get_session().get(url, headers={**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"})
            hf_raise_for_status(response)
            content: bytes = response.content
        except Exception as error:  # as above
            why = error
            continue
        if len(content) == end - begin:
            return content
        why = f"{len(content):,} bytes came in place of {end - begin:,}"
    raise CheckpointError(f"{url}: bytes {begin:,} to {end:,} do not come: {why}. The same command continues from here")
