"""Changes single states and tensors of a distributed checkpoint; the cuts of all others stay as ranks made them."""

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from amaxbridge.bridge.stored.torch_dist import DistCheckpoint

QUANTIZERS = "modelopt_quantizer_state"


class ChangedCheckpoint:
    """A checkpoint whose states and tensors are replaced: new bytes are appended to a file, and `.metadata` names them.

    Args:
        directory: the training's save directory, a copy.
    """

    def __init__(self, directory: Path) -> None:
        self._opened = DistCheckpoint(directory)
        self._place = self._opened.directory
        self._original = (self._place / ".metadata").read_bytes()

    def quantizer_states(self) -> dict[str, Mapping[str, Any]]:
        """State of each module that has quantizers → its quantizers by name, each with its attributes."""
        found = {key: self._read(key) for key in self._opened.states}
        states = {key: state.get(QUANTIZERS) for key, state in found.items() if isinstance(state, dict)}
        return {key: quantizers for key, quantizers in states.items() if quantizers}

    def change(self, states: Mapping[str, Callable[[dict[str, Any]], object]], tensors: Mapping[str, Tensor]) -> None:
        """Writes the checkpoint as it was with these changes alone.

        Args:
            states: state of a module → what changes its quantizers, by name.
            tensors: tensors to add or replace.
        """
        metadata: Metadata = pickle.loads(self._original)
        for key, changing in states.items():
            state = self._read(key)
            changing(state[QUANTIZERS])
            inner = io.BytesIO()
            torch.save(state, inner)
            data = torch.frombuffer(bytearray(inner.getvalue()), dtype=torch.uint8)
            self._append(metadata, MetadataIndex(key), [data])  # as ModelOpt serializes it, and Megatron saves it
        for key, tensor in tensors.items():
            chunk = ChunkStorageMetadata(torch.Size([0] * tensor.ndim), tensor.shape)
            properties = TensorProperties.create_from_tensor(tensor)
            metadata.state_dict_metadata[key] = TensorStorageMetadata(properties, tensor.shape, [chunk])
            self._append(metadata, MetadataIndex(key, chunk.offsets, 0), tensor)
        (self._place / ".metadata").write_bytes(pickle.dumps(metadata))

    def _read(self, key: str) -> Any:
        state = torch.load(io.BytesIO(self._opened.state(key)), weights_only=False)
        state = state[0] if isinstance(state, list) else state
        if isinstance(state, Tensor) and state.numel():
            state = torch.load(io.BytesIO(state.numpy().tobytes()), weights_only=False)
        return state

    def _append(self, metadata: Metadata, index: MetadataIndex, value: Any) -> None:
        held = metadata.storage_data
        written = io.BytesIO()
        torch.save(value, written)
        like = next((old for old in held if old.fqn == index.fqn), None)
        file = held[like].relative_path if like else next(iter(held.values())).relative_path
        place = self._place / file
        offset = place.stat().st_size
        with place.open("ab") as opened:
            opened.write(written.getvalue())
        for old in [each for each in held if each.fqn == index.fqn]:
            del held[old]
        held[index] = _StorageInfo(file, offset, len(written.getvalue()))


def altered(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    """Sets an attribute of every quantizer of a module."""
    return lambda quantizers: [setting.update({name: value}) for setting in quantizers.values()]
