"""Files of `torch.save`, opened without running code: the pickle as data, and tensors that are read one by one.

A file is a zip archive: `data.pkl`, and the bytes of each storage, uncompressed, in `data/KEY`. A tensor in the pickle
names its storage, and its place there. Only the bytes of a tensor that is asked for are read.

Layout: torch.serialization, `_save`; torch._utils, `_rebuild_tensor_v2` and `_v3`.
"""

import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from amaxbridge.bridge.stored.inert_pickle import Made, Named, NotReadable, pickle_in
from amaxbridge.export.disk.input_files import open_input
from amaxbridge.export.disk.io_errors import explaining_reads
from amaxbridge.mappings.errors import CheckpointError

_ORDER = b"little"
_LOCAL_HEADER = 30  # bytes of a member's header, before its name
_STORAGES = {  # dtypes that PyTorch names by classes; of others the pickle has the dtype itself
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_UNTYPED = Named("torch.storage", "UntypedStorage")


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor in a file of `torch.save`.

    Args:
        place: shape, strides and offset in its storage, on the meta device; views of it are places, too.
        storage: the key of its storage.
    """

    place: Tensor
    storage: str

    @classmethod
    def of(cls, value: Any) -> "SavedTensor | None":
        """The tensor that a value of the pickle describes, None for any other value.

        Raises:
            NotReadable: it lies outside its storage, or has a dtype that PyTorch lacks.
        """
        match value:
            case Made(by=Named("torch._utils", "_rebuild_parameter"), arguments=(data, *_)):
                value = data
        match value:
            case Made(
                by=Named("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor_v3"),
                arguments=(Made(by=Named("", "persistent_load"), arguments=stored), offset, size, stride, _, _, *more),
            ):
                dtype = next((each for each in more if isinstance(each, torch.dtype)), None)
            case _:
                return None
        return cls._placed(stored, offset, size, stride, dtype)

    @classmethod
    def _placed(cls, stored: Any, offset: Any, size: Any, stride: Any, dtype: Any) -> "SavedTensor":
        match stored:
            case ("storage", Named() as kind, str(key), _, int(count)) if key.isalnum():
                if kind != _UNTYPED:
                    dtype = _STORAGES.get(kind.name) if kind.module == "torch" else None
                elif isinstance(dtype, torch.dtype):
                    count //= dtype.itemsize
                if not isinstance(dtype, torch.dtype):
                    raise NotReadable(f"a tensor of {kind}")
            case _:
                raise NotReadable("a tensor without a storage")
        try:
            storage = torch.empty(count, dtype=dtype, device="meta")
            place = storage.as_strided(size, stride, offset)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise NotReadable("a tensor that lies outside its storage") from error
        if type(offset) is not int or offset + _span(place) > count or place.numel() > count:
            raise NotReadable("a tensor that lies outside its storage, or is larger")
        return cls(place, key)


class TorchArchive:
    """A file of `torch.save`, whose tensors can be read; see `open_archive`."""

    def __init__(self, path: Path, inside: Path, members: Mapping[str, zipfile.ZipInfo]) -> None:
        self.path, self._inside, self._members = path, inside, members

    def read(self, tensor: SavedTensor) -> Tensor:
        """The data of a tensor, on the CPU.

        Raises:
            CheckpointError: the file does not hold it.
        """
        place = tensor.place
        member = self._members.get(tensor.storage)
        begin, nbytes = int(place.storage_offset()) * place.itemsize, _span(place) * place.itemsize
        if member is None or member.compress_type != zipfile.ZIP_STORED or begin + nbytes > member.file_size:
            raise _damaged(self.path, f"storage {tensor.storage} is missing, compressed or too short")
        data = torch.empty(nbytes, dtype=torch.uint8)
        with explaining_reads(self.path), open(open_input(self.path, self._inside), "rb") as file:
            header = os.pread(file.fileno(), _LOCAL_HEADER, member.header_offset)
            more = sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))  # its name and extra field
            begin += member.header_offset + _LOCAL_HEADER + more
            rest = memoryview(data.numpy())
            while rest and (count := os.preadv(file.fileno(), [rest], begin)):
                rest, begin = rest[count:], begin + count
        if rest:
            raise CheckpointError(f"{self.path} became shorter while it was read: copy the file again")
        return data.view(place.dtype).as_strided(place.shape, place.stride(), 0)

    def bytes_of(self, tensor: SavedTensor) -> bytes:
        """The bytes of a tensor."""
        return bytes(self.read(tensor).contiguous().view(torch.uint8).numpy())


def open_archive(path: Path, inside: Path) -> tuple[Any, TorchArchive]:
    """The value of a file of `torch.save` as `inert_pickle` reads it, and the file, to read the value's tensors.

    Args:
        inside: the directory in which the file must lie.

    Raises:
        CheckpointError: it cannot be read, or is another kind of file.
    """
    try:
        with explaining_reads(path), open(open_input(path, inside), "rb") as file, zipfile.ZipFile(file) as archive:
            value, root = pickle_in(archive)
            members = {PurePosixPath(each.filename): each for each in archive.infolist()}
            if min(each.header_offset for each in members.values()):  # a module's state, at the end of a cut file
                raise NotReadable("its beginning or its end is missing")
            order = members.get(root / "byteorder")
            if order is not None and (order.file_size > len(_ORDER) or archive.read(order) != _ORDER):
                raise NotReadable("its bytes are in big-endian order")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _damaged(path, error) from error
    storages = {name.name: each for name, each in members.items() if name.parent == root / "data"}
    return value, TorchArchive(path, inside, storages)


def _span(place: Tensor) -> int:
    """The number of elements from the first of a tensor to its last, in its storage."""
    steps = ((size - 1) * stride for size, stride in zip(place.shape, place.stride(), strict=True))
    return 1 + sum(steps) if place.numel() else 0


def _damaged(path: Path, why: object) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read as a file of torch.save: {why}\nCopy the file again. If PyTorch before 1.6 wrote it, "
        "load it there and save it with a newer one"
    )
