"""A quantized directory in the formats of compressed-tensors, without writing one: for the way back to training.

What `quantize` would keep under a scheme is that scheme's tensors here, and what it would dequantize is a plain weight.
A fused group is converted when one of its tensors is read, and stays until another is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amaxbridge.export.disk.row_chunks import Rows
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.model_free.architecture_of_input import knowledge_of
from amaxbridge.export.model_free.converters.conversion import decide_as_held, weight_dtype
from amaxbridge.export.model_free.converters.quantized_source import QuantizedSource
from amaxbridge.export.model_free.source_bundles import SourceBundle, bundles_of
from amaxbridge.export.schemes import Scheme


class ConvertedCheckpoint:
    """The tensors of a quantized directory by name, converted.

    Args:
        checkpoint: the directory, open for reading.
        source: its quantized modules.
        config: its config.json.

    Attributes:
        schemes: module → the scheme that it is kept under.
        dequantized: modules that are quantized in the directory and plain here.
    """

    def __init__(self, checkpoint: SafetensorsCheckpoint, source: QuantizedSource, config: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        shapes = {name: stored.spec.shape for name, stored in checkpoint.tensors.items()}
        knowledge = knowledge_of(config, None).with_axes_of(shapes)
        conversion = decide_as_held(source, shapes, knowledge=knowledge, dtype=weight_dtype(config))
        self.schemes: Mapping[str, Scheme] = conversion.kept_modules
        self.dequantized = [
            made for module in source.weights if module not in conversion.kept for made in conversion.modules_of(module)
        ]
        bundles = bundles_of("", checkpoint.tensors, knowledge.experts_in, conversion)
        self._bundles = {name: bundle for bundle in bundles for name in bundle.specs}
        self._last: tuple[SourceBundle, Mapping[str, Rows]] | None = None

    @property
    def directory(self) -> Path:
        return self._checkpoint.directory

    @property
    def weight_map(self) -> Mapping[str, object]:
        """The names of all tensors."""
        return self._bundles

    def has(self, name: str) -> bool:
        """True if `read` would find the tensor."""
        return bool(self.names_of(name))

    def names_of(self, name: str) -> list[str]:
        """As `SafetensorsCheckpoint.names_of`."""
        return [name] if name in self._bundles else self._checkpoint.names_of(name)

    def read(self, name: str) -> Tensor:
        """Reads one tensor into CPU memory.

        Raises:
            CheckpointError: there is no such tensor.
        """
        bundle = self._bundles.get(name)
        if bundle is None:
            return self._checkpoint.read(name)
        if self._last is None or self._last[0] is not bundle:
            self._last = bundle, bundle.load()
        parts = [part.rows.clone() for part in self._last[1][name].parts()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
