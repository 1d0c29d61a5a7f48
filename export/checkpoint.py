"""Reading a Hugging Face directory of safetensors, tensor by tensor."""

import json
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from export.metadata import INDEX_FILE
from export.packed_experts import packed_source
from mappings.errors import CheckpointError, listing
from mappings.family import PackedExperts


class SafetensorsCheckpoint:
    """The tensors of a directory, by name; files are opened when first needed and closed with the context.

    Args:
        packed: how the files hold experts where they are packed.

    Raises:
        CheckpointError: no safetensors files, or an index that names files which are not there.
    """

    def __init__(self, directory: Path, packed: PackedExperts | None = None) -> None:
        self.directory = directory
        self._packed = packed or PackedExperts()
        self._open_files: dict[str, Any] = {}
        self._stack = ExitStack()

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor name → file name."""
        index = self.directory / INDEX_FILE
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
            missing = sorted({file for file in weight_map.values() if not (self.directory / file).is_file()})
            if missing:
                raise CheckpointError(f"{index} names files that are not there:{listing(missing)}")
            return weight_map
        files = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if len(files) != 1:
            raise CheckpointError(
                f"{self.directory} has {len(files)} safetensors files and no {INDEX_FILE}: "
                + ("download the weights" if not files else "the index is missing")
            )
        return dict.fromkeys(self._file(files[0]).keys(), files[0])

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU; an expert's also where the experts are packed.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name in self.weight_map:
            tensor: Tensor = self._file(self.weight_map[name]).get_tensor(name)
            return tensor
        source = packed_source(name, self._packed)
        if source is not None and source.name in self.weight_map:
            return source.cut(self._part(source.name, source.expert))
        if source is not None and f"{source.name}_blocks" in self.weight_map:
            blocks, scales = (self._part(source.name + suffix, source.expert) for suffix in ("_blocks", "_scales"))
            return source.cut_mxfp4(blocks, scales)
        raise CheckpointError(f"{self.directory} has no tensor {name}")

    def _part(self, name: str, index: int) -> Tensor:
        part: Tensor = self._file(self.weight_map[name]).get_slice(name)[index]
        return part

    def _file(self, name: str) -> Any:
        if name not in self._open_files:
            try:
                self._open_files[name] = self._stack.enter_context(safe_open(self.directory / name, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.directory / name} cannot be read: {error}") from error
        return self._open_files[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._open_files.clear()
