"""The weights of a Hugging Face directory under Megatron's names: the base of adapters that were saved alone."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.live.model_walk import Parameter
from amaxbridge.bridge.plan.left_behind import check_nothing_is_left
from amaxbridge.bridge.plan.tensor_specs import MegatronSpecs, hf_tensors
from amaxbridge.export.dequantized import DequantizedCheckpoint
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.mappings.errors import CheckpointError, UsageError, listing
from amaxbridge.mappings.names import module_of


class HFWeights(Mapping[str, Tensor]):
    """As a mapping: every whole Megatron tensor, made of Hugging Face tensors on access.

    Raises:
        UsageError: the directory is quantized, so that its weights are not those that adapters were trained on.
        CheckpointError: tensors are missing, or the model has no place for some.
    """

    def __init__(self, hf: HFModel, weights: DequantizedCheckpoint) -> None:
        found = MegatronSpecs(hf, hf.model_config).mappings
        self._mappings = {name: mapping for name, mapping in found.items() if name not in hf.without_tensor}
        taken = [target for mapping in found.values() for target in mapping.targets]
        checkpoint = weights.checkpoint
        held = {target: checkpoint.names_of(target) for each in self._mappings.values() for target in each.targets}
        missing = [target for target, names in held.items() if not names]
        self._dtypes = {target: _dtype(weights, names[0]) for target, names in held.items() if names}
        if not all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in self._dtypes.values()):
            raise UsageError(
                f"{hf.source} is quantized: give hf= the directory of the weights that the adapters were trained on"
            )
        if missing:
            raise CheckpointError(
                f"{hf.source} has no weights of {len(missing)} tensors, and the checkpoint holds adapters alone:"
                f"{listing(missing)}\nGive hf= a directory with weights, or adapter.base= the checkpoint of the model"
            )
        check_nothing_is_left(hf, weights, taken)
        self._hf, self._weights, self._shapes = hf, weights, hf_tensors(hf)

    def parameters(self) -> Iterator[Parameter]:
        """All parameters, as tensors without data."""
        for name, mapping in self._mappings.items():
            held = {target: self._shapes[target].to(self._dtypes[target]) for target in mapping.targets}
            yield Parameter(name, mapping.split(held, self._hf.model_config, 0, 1))

    def __getitem__(self, name: str) -> Tensor:
        mapping = self._mappings[name]
        tensors = {target: self._weights.read(target) for target in mapping.targets}
        return mapping.split(tensors, self._hf.model_config, 0, 1)

    def __iter__(self) -> Iterator[str]:
        return iter(self._mappings)

    def __len__(self) -> int:
        return len(self._mappings)


def _dtype(weights: DequantizedCheckpoint, name: str) -> torch.dtype:
    """The dtype of a tensor in the files; one of a byte for a weight that is quantized there."""
    checkpoint, module = weights.checkpoint, module_of(name)
    quantized = module in weights.schemes or module in weights.dequantized
    if quantized or not isinstance(checkpoint, SafetensorsCheckpoint):
        return torch.uint8
    return checkpoint.tensors[name].spec.dtype
