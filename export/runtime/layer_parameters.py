"""The parameters of a layer that holds one rank's shard of one or more modules of a checkpoint.

A merged layer (q/k/v, gate/up) concatenates its modules' tensors on dim 0: rows of weights, and single numbers such as
global scales, one for each module. Each is loaded by the module's shard id from the checkpoint's whole tensor; where
the parameter is smaller, on rows or columns, the rank's shard is cut out. Fewer shards than ranks means that ranks
share them, as with key and value heads.

Only plain floats are cast. `check_loaded` names every tensor that was not loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.tensors import TensorSpec, shard_of

WEIGHT_SHAPE = "weight_shape"
"""The tensor that holds the shape `[out, in]` of a packed weight."""

ShardId = int | str | None
_SHARD_IDS: Mapping[str, int] = {"q": 0, "k": 1, "v": 2}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Partition:
    """The shard of a layer that one rank holds.

    Args:
        columns: number of inputs on this rank.
        rows: number of outputs on this rank, for each merged module.
        all_columns: number of inputs on all ranks.
        tp_rank: tensor-parallel rank.
        tp_size: tensor-parallel size.
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
        """Makes it from the arguments of `create_weights`.

        Without `tp_size` in `extra`, the sizes tell into how many shards the layer is cut.

        Raises:
            ValueError: the rank is not below the number of ranks.
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
        """Shape `[out, in]` and dtype of each module's weight on this rank."""
        return [TensorSpec((rows, self.columns), dtype) for rows in self.rows]


@dataclass(slots=True)
class Loader:
    """The `weight_loader` of one parameter. `sizes` is the length of each merged module on dim 0."""

    name: str
    sizes: tuple[int, ...]
    partition: Partition
    is_number: bool
    loaded: set[int] = field(default_factory=set)

    def __call__(self, parameter: nn.Parameter, tensor: Tensor, shard_id: ShardId = None) -> None:
        """Copies a tensor of the checkpoint, or this rank's shard of it, into the parameter.

        Args:
            parameter: the parameter to fill.
            tensor: the whole tensor of one module, or of all modules if the checkpoint merges them, too.
            shard_id: the module: `q`, `k`, `v` or a number; None for the only one, or for all.

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
        if self.name == WEIGHT_SHAPE and tensor.shape == (
            2,
        ):  # of all modules together: each has its share of the rows
            rows, (all_rows, columns) = self.partition.rows, tensor.tolist()
            shares = [[all_rows * share // sum(rows), columns] for share in rows]
            return {number: tensor.new_tensor(share) for number, share in enumerate(shares)}
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
    """Registers the merged parameters of a layer's modules.

    Args:
        layer: the layer that gets the parameters.
        specs: for each module, name → shape and dtype on this rank.
        partition: the shard of this rank.
        extra: attributes for every parameter; a `weight_loader` among them replaces ours.
    """
    for name, first in specs[0].items():
        sizes = tuple(spec[name].shape[0] for spec in specs)
        data = torch.empty((sum(sizes), *first.shape[1:]), dtype=first.dtype)
        parameter = nn.Parameter(data, requires_grad=False)
        is_number = first.shape == (1,)
        loader = Loader(name, sizes, partition, is_number)
        if "weight_loader" in extra:
            loader.loaded.update(range(len(sizes)))  # the caller's loader does not report to us
        for attribute, value in {"weight_loader": loader, **extra, "loader": loader}.items():
            setattr(parameter, attribute, value)
        layer.register_parameter(name, parameter)


def check_loaded(layer: nn.Module) -> None:
    """Checks that every parameter was loaded for every module.

    Raises:
        CheckpointError: some were not; names all of them. Parameters with a `weight_loader` of the caller are skipped.
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
    """The tensors of each merged module of a layer, as views."""
    loaders = _loaders(layer)
    count = len(next(iter(loaders.values())).sizes)
    return [{name: module_part(layer.get_parameter(name), number) for name in loaders} for number in range(count)]


def module_part(parameter: Tensor, number: int) -> Tensor:
    """The part of a parameter that belongs to one merged module, as a view."""
    sizes = parameter.loader.sizes  # type: ignore[attr-defined]
    return parameter.data.narrow(0, sum(sizes[:number]), sizes[number])


def shared(layer: nn.Module, name: str) -> Tensor:
    """The value of a parameter that all merged modules of a layer share.

    Raises:
        CheckpointError: the values differ; shows them.
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
    """Replaces a parameter by a tensor of any shape and dtype, which no longer takes part in loading."""
    layer.register_parameter(name, nn.Parameter(new_data.detach(), requires_grad=False))


def _loaders(layer: nn.Module) -> dict[str, Loader]:
    parameters = layer.named_parameters(recurse=False)
    return {name: parameter.loader for name, parameter in parameters if hasattr(parameter, "loader")}


def _number(shard_id: ShardId) -> int:
    if isinstance(shard_id, str):
        return _SHARD_IDS.get(shard_id, -1)
    return shard_id or 0
