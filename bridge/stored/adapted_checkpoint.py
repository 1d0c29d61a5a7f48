"""A checkpoint with adapters, and the model that they belong to: in it, in another, or a directory's weights.

Megatron-Bridge saves adapters alone; whoever saves the whole model saves both.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.live.model_walk import Parameter
from amaxbridge.bridge.stored.adapter_settings import RUN_CONFIG, pretrained_checkpoint
from amaxbridge.bridge.stored.hf_weights import HFWeights
from amaxbridge.bridge.stored.identification import stored_model
from amaxbridge.bridge.stored.open_checkpoint import files_of, open_checkpoint
from amaxbridge.bridge.stored.stored_model import StoredModel
from amaxbridge.export.dequantized import open_dequantized
from amaxbridge.export.disk.input_paths import given_path
from amaxbridge.export.disk.source_files import SourceFiles
from amaxbridge.mappings.adapters import is_adapter
from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.names import is_quantizer_state


@dataclass(frozen=True, slots=True)
class AdaptedModel(Mapping[str, Tensor]):
    """The model of a checkpoint with adapters. As a mapping: every whole tensor by canonical name, read on access.

    Args:
        adapters: what holds the adapters.
        base: what holds the model.
        files: what is read beside the checkpoint of the adapters.
    """

    adapters: StoredModel
    base: StoredModel | HFWeights
    files: tuple[SourceFiles, ...] = ()

    def parameters(self) -> list[Parameter]:
        """All parameters, those of adapters last, as tensors without data."""
        adapters = [each for each in self.adapters.parameters() if is_adapter(each.name)]
        return [*(each for each in self.base.parameters() if not is_adapter(each.name)), *adapters]

    def __getitem__(self, name: str) -> Tensor:
        return (self.adapters if is_adapter(name) else self.base)[name]

    def __iter__(self) -> Iterator[str]:
        return (each.name for each in self.parameters())

    def __len__(self) -> int:
        return len(self.parameters())


def holds_model(stored: StoredModel) -> bool:
    """True if a checkpoint holds anything but adapters."""
    return not all(is_adapter(name) or is_quantizer_state(name) for name in stored.tensors)


@contextmanager
def adapted_model(hf: HFModel, stored: StoredModel, base: str | Path | None, *, hashed: bool) -> Iterator[AdaptedModel]:
    """Opens the model that adapters belong to.

    Args:
        base: its checkpoint, if the user gives one.
        hashed: as in `SourceFiles`.

    Raises:
        UsageError: there is no such model, or one too many.
    """
    if holds_model(stored):
        if base is not None:
            raise UsageError(
                f"adapter.base= is for adapters that were saved alone, and {stored.checkpoint.directory} holds their "
                "model: leave it out"
            )
        yield AdaptedModel(stored, stored)
    elif base is not None:
        files = files_of(given_path(base), hashed=hashed)
        yield AdaptedModel(stored, stored_model(open_checkpoint(files.directory), hf), (files,))
    elif hf.directory is not None and (names := [each.name for each in hf.directory.glob("*.safetensors*")]):
        files = SourceFiles.of(hf.directory, names, hashed=hashed)
        with hf.open_files(hf.family.packed_experts) as checkpoint:
            yield AdaptedModel(stored, HFWeights(hf, open_dequantized(checkpoint, hf.written)), (files,))
    else:
        trained_on = pretrained_checkpoint(stored.checkpoint.directory)
        said = f" ({RUN_CONFIG} names {trained_on})" if trained_on else ""
        raise UsageError(
            f"{stored.checkpoint.directory} holds adapters alone: give adapter.base= the checkpoint of the model that "
            f"they were trained on{said}, or hf= a directory with its weights"
        )
