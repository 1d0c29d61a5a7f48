"""The parameters of a layer that holds one rank's part of one or more modules of a checkpoint.

A merged layer (q/k/v, gate/up) holds its modules' tensors one after another on dim 0: rows of weights, and numbers such
as global scales, one for each module. Each is loaded by the module's shard id, from the whole tensor of the
checkpoint; the part for the rank is cut out where the parameter is smaller, on rows or on columns. Fewer parts than
ranks means that ranks share them, as with key and value heads.

Nothing is cast that is not a plain float, and nothing is believed to be loaded: `check_loaded` names what is missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.tensors import TensorSpec, shard_of

ShardId = int | str | None
_SHARD_IDS: Mapping[str, int] = {"q": 0, "k": 1, "v": 2}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Partition:
    """What a rank holds of a layer.

    Args:
        columns: inputs on this rank.
        rows: outputs on this rank, of each merged module.
        all_columns: inputs on all ranks.
        tp_rank: of this rank.
        tp_size: how many ranks the layer is cut into.
    """

    columns: int
    rows: tuple[int, ...]
    all_columns: int
    tp_rank: int = 0
    tp_size: int = 1

    @classmethod
    def of(
        cls,
        input_size_per_partition: int,
        output_partition_sizes: Sequence[int],
        input_size: int,
        output_size: int,
        extra: Mapping[str, object],
    ) -> "Partition":
        """From the arguments of `create_weights`.

        Without `tp_size` in `extra`, the layer is cut as often as its sizes say.

        Raises:
            ValueError: the rank is not one of the ranks.
        """
        rows = tuple(output_partition_sizes)
        cuts = max(1, input_size // input_size_per_partition, output_size // sum(rows))
        rank, size = extra.get("tp_rank", 0), extra.get("tp_size", cuts)
        if not (isinstance(rank, int) and isinstance(size, int) and 0 <= rank < size):
            raise ValueError(f"tp_rank={rank} is none of tp_size={size} ranks")
        return cls(input_size_per_partition, rows, input_size, rank, size)

    @property
    def cuts_rows(self) -> bool:
        return self.tp_size > 1 and self.columns == self.all_columns

    def weight_specs(self, dtype: torch.dtype) -> list[TensorSpec]:
        """The weight `[out, in]` of each module on this rank."""
        return [TensorSpec((rows, self.columns), dtype) for rows in self.rows]


@dataclass(slots=True)
class Loader:
    """Loads one parameter; is its `weight_loader`. `sizes` is the length on dim 0 of each merged module."""

    name: str
    sizes: tuple[int, ...]
    partition: Partition
    is_number: bool
    loaded: set[int] = field(default_factory=set)

    def __call__(self, parameter: nn.Parameter, tensor: Tensor, shard_id: ShardId = None) -> None:
        """Copies a tensor of the checkpoint, or this rank's part of it.

        Args:
            parameter: where to.
            tensor: whole, of one module; of all modules where they are merged in the checkpoint too.
            shard_id: which module: `q`, `k`, `v` or a number; None for the only one, or for all.

        Raises:
            CheckpointError: the tensor does not fit; names both shapes and dtypes.
        """
        if shard_id is None and len(self.sizes) > 1:
            parts = self._parts(tensor)
        else:
            parts = {_number(shard_id): tensor.reshape(1) if tensor.ndim == 0 else tensor}
        for number, part in parts.items():
            if number not in range(len(self.sizes)):
                raise CheckpointError(f"{self.name} has {len(self.sizes)} modules, and none is {shard_id!r}")
            self._copy(module_part(parameter, number), part, number)

    def _parts(self, tensor: Tensor) -> dict[int, Tensor]:
        total = sum(self.sizes)
        if self.is_number and tensor.numel() == self.sizes[0]:
            return {number: tensor.reshape(-1) for number in range(len(self.sizes))}
        if tensor.ndim == 0 or len(tensor) % total:
            raise CheckpointError(
                f"{self.name}: {TensorSpec.of(tensor)} is not {list(self.sizes)} on dim 0, or a multiple"
            )
        return dict(enumerate(tensor.split([size * (len(tensor) // total) for size in self.sizes])))

    def _copy(self, target: Tensor, tensor: Tensor, number: int) -> None:
        part = tensor
        if tensor.ndim == target.ndim:
            for dim, (whole, wanted) in enumerate(zip(tensor.shape, target.shape, strict=True)):
                count = whole // wanted if wanted else 0
                if count > 1 and whole == count * wanted and self.partition.tp_size % count == 0:
                    part = shard_of(part, dim, self.partition.tp_rank * count // self.partition.tp_size, count)
        castable = target.dtype in _FLOATS and tensor.dtype in _FLOATS
        if part.shape != target.shape or not (tensor.dtype == target.dtype or castable):
            raise CheckpointError(
                f"{self.name}: the checkpoint has {TensorSpec.of(tensor)}, the layer needs {TensorSpec.of(target)} "
                f"on rank {self.partition.tp_rank} of {self.partition.tp_size}"
            )
        target.copy_(part)
        self.loaded.add(number)


def create_parameters(
    layer: nn.Module, specs: Sequence[Mapping[str, TensorSpec]], partition: Partition, extra: Mapping[str, object]
) -> None:
    """Registers the tensors of a layer's modules, merged.

    Args:
        layer: gets the parameters.
        specs: for each module, name → what this rank holds of it.
        partition: what this rank holds.
        extra: attributes for every parameter; a `weight_loader` replaces the one that is here.
    """
    for name, first in specs[0].items():
        sizes = tuple(spec[name].shape[0] for spec in specs)
        data = torch.empty((sum(sizes), *first.shape[1:]), dtype=first.dtype)
        parameter = nn.Parameter(data, requires_grad=False)
        is_number = first.shape == (1,)
        loader = Loader(name, sizes, partition, is_number)
        if "weight_loader" in extra:
            loader.loaded.update(range(len(sizes)))  # not watched
        for attribute, value in {"weight_loader": loader, **extra, "loader": loader}.items():
            setattr(parameter, attribute, value)
        layer.register_parameter(name, parameter)


def check_loaded(layer: nn.Module) -> None:
    """Checks that every module's part of every parameter was loaded.

    Raises:
        CheckpointError: some were not; names all. A `weight_loader` of the caller's is not watched.
    """
    missing = [
        f"{name}" + (f" of module {number}" if len(loader.sizes) > 1 else "")
        for name, loader in _loaders(layer).items()
        for number in range(len(loader.sizes))
        if number not in loader.loaded
    ]
    if missing:
        raise CheckpointError(f"{len(missing)} tensors were never loaded:{listing(missing)}")


def module_parts(layer: nn.Module) -> list[dict[str, Tensor]]:
    """The tensors of each merged module of a layer, views."""
    loaders = _loaders(layer)
    count = len(next(iter(loaders.values())).sizes)
    return [{name: module_part(layer.get_parameter(name), number) for name in loaders} for number in range(count)]


def module_part(parameter: Tensor, number: int) -> Tensor:
    """The part of a parameter that one merged module fills, a view."""
    sizes = parameter.loader.sizes  # type: ignore[attr-defined]
    return parameter.data.narrow(0, sum(sizes[:number]), sizes[number])


def shared(layer: nn.Module, name: str) -> Tensor:
    """The value that all merged modules of a layer have in a parameter.

    Raises:
        CheckpointError: they differ; shows them.
    """
    values = [part[name] for part in module_parts(layer)]
    if any(not torch.equal(value, values[0]) for value in values):
        shown = [f"module {number}: {value.flatten()[:4].tolist()}" for number, value in enumerate(values)]
        raise CheckpointError(
            f"{name} differs between modules that run as one layer:{listing(shown)}\n"
            "An engine keeps one and is off for the others, in silence: export the fused group with equal ones"
        )
    return values[0]


def data_of(layer: nn.Module, name: str) -> Tensor:
    """A parameter's tensor."""
    return layer.get_parameter(name).data


def replace_parameter(layer: nn.Module, name: str, new_data: Tensor) -> None:
    """Puts a tensor of any shape and dtype in the place of a parameter; it is no longer one to load."""
    layer.register_parameter(name, nn.Parameter(new_data.detach(), requires_grad=False))


def _loaders(layer: nn.Module) -> dict[str, Loader]:
    parameters = layer.named_parameters(recurse=False)
    return {name: parameter.loader for name, parameter in parameters if hasattr(parameter, "loader")}


def _number(shard_id: ShardId) -> int:
    if isinstance(shard_id, str):
        return _SHARD_IDS.get(shard_id, -1)
    return shard_id or 0
