"""Reading a Hugging Face directory of safetensors, tensor by tensor."""

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from amaxbridge.export.disk.input_paths import weight_file_name
from amaxbridge.export.disk.io_errors import changed_meanwhile, explaining_reads
from amaxbridge.export.disk.open_files import OpenFiles
from amaxbridge.export.disk.packed_experts import FindPacked, found_in
from amaxbridge.export.disk.safetensors_file import SafetensorsFile, StoredTensor
from amaxbridge.export.disk.strict_json import read_json_object
from amaxbridge.export.output.config_and_index import INDEX_FILE, QUANT_STATE_FILE
from amaxbridge.mappings.errors import CheckpointError, listing


class SafetensorsCheckpoint:
    """The tensors of a directory by name. Files are opened on first use and closed with the context.

    Args:
        packed: finds the experts of packed tensors, where the files have them.
        spelling: a tensor's name in files → its name here; None if they are the same.

    Raises:
        CheckpointError: there are no safetensors files, or the index names files that do not exist.
    """

    def __init__(
        self, directory: Path, packed: FindPacked | None = None, spelling: Callable[[str], str] | None = None
    ) -> None:
        self.directory = directory
        self._spelling = spelling
        self._packed = packed or found_in(None)
        self._files: dict[str, SafetensorsFile] = {}
        self._tensors_of: dict[str, Mapping[str, StoredTensor]] = {}
        self._open_files = OpenFiles()

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor name → file name, from the index."""
        index = self.directory / INDEX_FILE
        content = read_json_object(index)
        if content is not None:
            stated = content.get("weight_map")
            if not isinstance(stated, dict):
                raise CheckpointError(f"{index} is not the index of a checkpoint: it has no weight_map")
            weight_map = {name: weight_file_name(file, index) for name, file in self._spelled(stated).items()}
            missing = sorted({file for file in weight_map.values() if not self._is_there(file)})
            if missing:
                raise CheckpointError(f"{index} names files that are not there:{listing(missing)}")
            return weight_map
        files = self._files_of_weights()
        if len(files) != 1:
            raise CheckpointError(
                f"{self.directory} has {len(files)} safetensors files and no {INDEX_FILE}: "
                + ("the index is missing" if files else self._without_files())
            )
        return dict.fromkeys(self.tensors_in(files[0]), files[0])

    def _without_files(self) -> str:
        """The next step where there are no safetensors files."""
        if any(self.directory.glob("*.bin")):
            return "load the .bin files in transformers and save them again (save_pretrained)"
        return "download the weights"

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by name; reads all headers.

        Raises:
            CheckpointError: index and files disagree, or a tensor is in two files; all of them are named.
        """
        names = sorted({*self.weight_map.values(), *self._files_of_weights()})
        found = [(name, file, stored) for file in names for name, stored in self.tensors_in(file).items()]
        tensors = {name: stored for name, file, stored in found if self.weight_map.get(name) == file}
        problems = [f"{name}: in {file}, not in the index" for name, file, _ in found if name not in self.weight_map]
        problems += [
            f"{name}: in {file}, and in {self.weight_map[name]} as the index says"
            for name, file, _ in found
            if self.weight_map.get(name, file) != file
        ]
        problems += [
            f"{name}: in the index, not in {file}" for name, file in self.weight_map.items() if name not in tensors
        ]
        if problems:
            raise CheckpointError(
                f"{self.directory}: the index and the files disagree on {len(problems)} tensors:{listing(problems)}\n"
                "Download the checkpoint again, or remove files that are not of it"
            )
        return tensors

    def file(self, name: str) -> SafetensorsFile:
        """One file of the directory."""
        if name not in self._files:
            self._files[name] = SafetensorsFile(self.directory / name, self._open_files, self.directory)
        return self._files[name]

    def tensors_in(self, file: str) -> Mapping[str, StoredTensor]:
        """The tensors of one file, under the names here."""
        if file not in self._tensors_of:
            self._tensors_of[file] = self._spelled(self.file(file).tensors)
        return self._tensors_of[file]

    def _spelled[T](self, named: Mapping[str, T]) -> Mapping[str, T]:
        """The same under the names here.

        Raises:
            CheckpointError: files have one tensor under two names.
        """
        if self._spelling is None:
            return named
        found = {self._spelling(name): each for name, each in named.items()}
        if len(found) < len(named):
            raise CheckpointError(f"{self.directory} has tensors under both spellings of their names")
        return found

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file of weights changed since it was opened, or another index is there."""
        for file in self._files.values():
            file.check_unchanged()
        again = SafetensorsCheckpoint(self.directory, spelling=self._spelling)
        if "weight_map" in self.__dict__ and again.weight_map != self.weight_map:
            raise changed_meanwhile(self.directory / INDEX_FILE)

    def has(self, name: str) -> bool:
        """True if `read` would find the tensor; opens no file."""
        return bool(self.names_of(name))

    def names_of(self, name: str) -> list[str]:
        """The tensors of the files that `read` takes a tensor from: itself, or those that pack it; opens no file."""
        source = self._packed(name)
        packed = [f"{source.name}{end}" for end in ("", "_blocks", "_scales")] if source is not None else []
        return [each for each in (name, *packed) if each in self.weight_map]

    def read(self, name: str) -> Tensor:
        """Reads one tensor into CPU memory; an expert's tensor also from packed experts.

        Raises:
            CheckpointError: there is no such tensor.
        """
        stored = self._find(name)
        if stored is not None:
            return stored.read()
        source = self._packed(name)
        if source is not None and (packed := self._find(source.name)) is not None:
            return source.cut(packed.row(source.expert).read())
        if source is not None and (blocks := self._find(f"{source.name}_blocks")) is not None:
            scales = self._find(f"{source.name}_scales")
            if scales is not None:
                return source.cut_mxfp4(blocks.row(source.expert).read(), scales.row(source.expert).read())
        raise CheckpointError(f"{self.directory} has no tensor {name}")

    def _is_there(self, file: str) -> bool:
        return (self.directory / file).is_file()

    def _files_of_weights(self) -> list[str]:
        with explaining_reads(self.directory):
            names = os.listdir(self.directory)
        return sorted(name for name in names if name.endswith(".safetensors") and name != QUANT_STATE_FILE)

    def _find(self, name: str) -> StoredTensor | None:
        file = self.weight_map.get(name)
        if file is None:
            return None
        stored = self.tensors_in(file).get(name)
        if stored is None:
            raise CheckpointError(f"{self.directory / file} has no tensor {name}, though the index says so")
        return stored

    def close(self) -> None:
        self._files.clear()
        self._tensors_of.clear()
        self._open_files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
