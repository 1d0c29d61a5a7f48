"""The files of a legacy checkpoint (`--ckpt-format torch`), one for each rank, under global names.

    iter_0000100/mp_rank_01/model_optim_rng.pt               TP rank 1
    iter_0000100/mp_rank_01_002/model_optim_rng.pt           TP rank 1, and PP rank 2 or EP rank 2: the arguments tell
    iter_0000100/mp_rank_01_002_003/model_optim_rng.pt       TP rank 1, PP rank 2, EP rank 3

A file is one pickle of training's state: `args`, `model` (`model0`, `model1`, … in a virtual pipeline), and what is
around it; a distributed optimizer is in files beside it. It is read as data (`torch_archive`). Names are those of the
rank: layers count from the start of its stage, experts from the start of its block. Here they get the global numbers
that a live model has on its modules.

Source: megatron.training.checkpointing, `get_checkpoint_name` and `save_checkpoint`.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import Tensor

from amaxbridge.bridge.live.collect_amax import as_rows
from amaxbridge.bridge.live.model_walk import one_by_one
from amaxbridge.bridge.stored.checkpoint_kinds import rank_files
from amaxbridge.bridge.stored.inert_pickle import NotReadable
from amaxbridge.bridge.stored.module_state import quantizer_settings
from amaxbridge.bridge.stored.saved_arguments import namespace
from amaxbridge.bridge.stored.torch_archive import SavedTensor, TorchArchive, open_archive
from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.names import is_routed_expert

_RANKS = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?/")
_CHUNK = re.compile(r"model(\d{0,3})")
_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d{1,6}(?=\.)")
_EXPERT = re.compile(r"(\.experts\.(?:local_experts\.|linear_fc[12]\.(?:weight|bias)))(\d{1,4})(?=\.|$)")
_GROUPED = re.compile(r"\.experts\.(linear_fc[12])\.(?:(_extra_state)|(weight_quantizer)(?:\.(\d{1,4}))?(\.\w+))$")
_WEIGHT_AMAX = re.compile(r"(.+)\.(weight_quantizer(?:\.\d+)?)\._amax\w*")
_STATE = "._extra_state"
_ORDER_OF_TODAY = 2  # since this checkpoint_version, query, key and value have the order that they have now
_MOST_LEVELS = 8  # of nested modules in a state; before Megatron-Core, `language_model` had an `encoder`
_MOST_EXPERTS = 10_000
_RESAVE = "Load it in Megatron and save it with --ckpt-format torch_dist"


@dataclass(frozen=True, slots=True)
class Shard:
    """A tensor of one rank.

    Args:
        index: its number among the ranks that the tensor is sharded over.
    """

    index: int
    archive: TorchArchive
    tensor: SavedTensor

    def read(self) -> Tensor:
        """Its data, on the CPU."""
        return self.archive.read(self.tensor)


class Sizes(NamedTuple):
    """The parallel sizes of the saving ranks."""

    tp: int
    pp: int
    ep: int
    etp: int

    @classmethod
    def of(cls, arguments: Mapping[str, Any] | None, names: Sequence[str], directory: Path) -> Self:
        """Those in the saved arguments, or those of files that are of TP ranks alone.

        Raises:
            CheckpointError: nothing says which ranks the files are of, or several ranks wrote the same file.
        """
        if arguments is None:
            if any(found is None or found[2] for found in map(_RANKS.match, names)):
                raise CheckpointError(
                    f"{directory} has no saved arguments: nothing says if its files are of pipeline or of expert "
                    f"ranks. {_RESAVE}"
                )
            return cls(len(names), 1, 1, len(names))
        axes = ("tensor_model", "pipeline_model", "expert_model", "expert_tensor")
        tp, pp, ep, etp = (arguments.get(f"{axis}_parallel_size") or None for axis in axes)
        sizes = cls(*(size if type(size) is int else 1 for size in (tp, pp, ep, etp or tp)))
        if sizes.tp % sizes.etp:
            raise CheckpointError(
                f"{directory} was saved at TP={sizes.tp} and ETP={sizes.etp}, where ranks with different shards of "
                "experts wrote one file: some are lost. Save with --ckpt-format torch_dist"
            )
        return sizes

    def place(self, name: str) -> tuple[int, int, int] | None:
        """The TP, PP and EP rank of a file, None if there is no such rank."""
        found = _RANKS.match(name)
        numbers = [int(number) for number in found.groups() if number is not None] if found else []
        wanted = [self.tp, *(size for size in (self.pp, self.ep) if size > 1)]
        if len(numbers) != len(wanted) or any(number >= size for number, size in zip(numbers, wanted, strict=True)):
            return None
        tp, *others = numbers
        pp = others.pop(0) if self.pp > 1 else 0
        return tp, pp, others[0] if others else 0

    def shards(self, name: str) -> int:
        """Number of ranks that a tensor may be sharded over."""
        return self.etp if is_routed_expert(name) else self.tp


class RankFiles:
    """All files of a legacy checkpoint.

    Args:
        directory: an iteration's directory.

    Raises:
        CheckpointError: files are missing or damaged, or hold what is no model.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        names = rank_files(directory)
        opened = {name: open_archive(directory / name, directory) for name in names}
        contents = {name: _checked(value, directory / name) for name, (value, _) in opened.items()}
        self.arguments: Any = contents[names[0]].get("args")
        arguments = namespace(self.arguments)
        self.sizes = Sizes.of(arguments, names, directory)
        experts = (arguments or {}).get("num_experts")
        per_rank = experts // self.sizes.ep if type(experts) is int and 0 < experts < _MOST_EXPERTS else 0
        places = {name: self._place(name) for name in names}
        twice = [name for name in names if list(places.values()).count(places[name]) > 1]
        if twice:
            raise CheckpointError(
                f"{directory} has several files of the same ranks:{listing(twice)}\nRemove one of them"
            )
        chunks = [
            _Chunk(number, *places[name], opened[name][1], _flat(model), per_rank)
            for name, content in contents.items()
            for number, model in _models(content, directory / name)
        ]
        self.shards: dict[str, list[Shard]] = defaultdict(list)
        self.states: dict[str, tuple[_Chunk, Any]] = {}
        first = self._first_layers(chunks)
        for chunk in chunks:
            for name, view in chunk.tensors(first[chunk.number, chunk.pp]):
                self.shards[name].append(Shard(chunk.tp % self.sizes.shards(name), chunk.archive, view))
            for name, state in chunk.states(first[chunk.number, chunk.pp]):
                self.states.setdefault(f"{name}/shard_0_1", (chunk, state))
        self._check_complete(chunks)

    def _check_complete(self, chunks: Sequence["_Chunk"]) -> None:
        held = {axis: {getattr(chunk, axis) for chunk in chunks} for axis in ("tp", "pp", "ep")}
        missing = [
            f"files of {len(found)} of {getattr(self.sizes, axis)} {axis.upper()} ranks"
            for axis, found in held.items()
            if len(found) < getattr(self.sizes, axis)
        ]
        counts = {name: len({shard.index for shard in found}) for name, found in self.shards.items()}
        missing += [
            f"{name}: {count} of {self.sizes.shards(name)} shards"
            for name, count in counts.items()
            if count < self.sizes.shards(name)
        ]
        if missing:
            raise CheckpointError(
                f"{self.directory} lacks files of ranks. It was saved at TP={self.sizes.tp}, PP={self.sizes.pp}, "
                f"EP={self.sizes.ep}, ETP={self.sizes.etp}:{listing(missing)}\nCopy all of its directories"
            )

    def _place(self, name: str) -> tuple[int, int, int]:
        place = self.sizes.place(name)
        if place is None:
            raise CheckpointError(
                f"{self.directory / name} is of no rank of TP={self.sizes.tp}, PP={self.sizes.pp}, EP={self.sizes.ep}, "
                "the sizes in the saved arguments. Remove files of other trainings"
            )
        return place

    @staticmethod
    def _first_layers(chunks: Sequence["_Chunk"]) -> dict[tuple[int, int], int]:
        """The global number of the first layer of each chunk and stage: chunks go around the stages in turn."""
        counts = defaultdict[tuple[int, int], int](int)
        for chunk in chunks:
            counts[chunk.number, chunk.pp] = max(counts[chunk.number, chunk.pp], chunk.layers)
        first, begin = {}, 0
        for each in sorted(counts):
            first[each] = begin
            begin += counts[each]
        return first


@dataclass(frozen=True)
class _Chunk:
    """A model chunk in a file.

    Args:
        number: of the virtual pipeline.
        content: local name → value in the pickle.
        per_rank: number of experts of a rank in the arguments; 0 if they do not say.
    """

    number: int
    tp: int
    pp: int
    ep: int
    archive: TorchArchive
    content: Mapping[str, Any]
    per_rank: int

    @cached_property
    def layers(self) -> int:
        """Number of decoder layers."""
        return 1 + max((int(found[0]) for name in self.content if (found := _LAYER.search(name))), default=-1)

    @cached_property
    def experts(self) -> range:
        """The global numbers of its experts."""
        count = 1 + max(
            (int(found[2]) for name in self.content if (found := _EXPERT.search(name))), default=self.per_rank - 1
        )
        return range(self.ep * count, (self.ep + 1) * count)

    def tensors(self, first_layer: int) -> Iterator[tuple[str, SavedTensor]]:
        """Every tensor under its global name. The amax of blocks has a row for each row of its weight."""
        for local, value in self.content.items():
            if local.endswith(_STATE):
                continue
            tensor = self._saved(local, value)
            if tensor is None:
                raise CheckpointError(f"{self.archive.path}: {local} is no tensor. {_RESAVE}")
            name = self._renumbered(local, first_layer)
            try:
                singles = list(one_by_one(name, self._in_rows(local, tensor.place), self.experts))
            except (RuntimeError, ValueError, ZeroDivisionError) as error:
                raise CheckpointError(f"{self.archive.path}: {local} does not divide among experts: {error}") from error
            for single in singles:
                for spelled in self._of_experts(single.name):
                    yield spelled, SavedTensor(single.tensor, tensor.storage)

    def states(self, first_layer: int) -> Iterator[tuple[str, Any]]:
        """The states of modules, that of a grouped linear once for each of its experts."""
        for local, value in self.content.items():
            if local.endswith(_STATE):
                for name in self._of_experts(self._renumbered(local, first_layer)):
                    yield name, value

    def _renumbered(self, local: str, first_layer: int) -> str:
        name = _LAYER.sub(lambda found: str(first_layer + int(found[0])), local)
        return _EXPERT.sub(lambda found: f"{found[1]}{self.experts[int(found[2])]}", name)

    def _of_experts(self, name: str) -> Iterator[str]:
        """The names in torch_dist's spelling of what a grouped linear keeps for its experts; else the name."""
        found = _GROUPED.search(name)
        if found is None:
            yield name
            return
        numbers = self.experts if found[4] is None else [self.experts[int(found[4])]]
        for expert in numbers:
            rest = found[2] or f"{found[3]}{found[5]}"
            yield f"{name[: found.start()]}.experts.experts.{expert}.{found[1]}.{rest}"

    def _in_rows(self, local: str, place: Tensor) -> Tensor:
        """The place of a tensor, with a row of amax for each row of the weight."""
        found = _WEIGHT_AMAX.fullmatch(local)
        module, quantizer = found.groups() if found else ("", "")
        weight = self._saved(local, self.content.get(f"{module}.weight{quantizer.partition('.')[2]}"))
        if weight is None or place.numel() == 1:
            return place
        state = self.content.get(f"{module}{_STATE}")
        settings = quantizer_settings(self.state(local, state), f"{module}{_STATE} of {self.archive.path}")
        blocks = settings.get(quantizer, {}).get("_block_sizes")
        return as_rows(place, weight.place.shape[0], blocks)

    def state(self, local: str, value: Any) -> Any:
        """The value of a module's state; if that is a tensor of bytes, the bytes."""
        tensor = self._saved(local, value)
        return value if tensor is None else self.archive.bytes_of(tensor)

    def _saved(self, local: str, value: Any) -> SavedTensor | None:
        try:
            return SavedTensor.of(value)
        except NotReadable as error:
            raise CheckpointError(f"{self.archive.path}: {local} is {error}") from error


def _checked(value: Any, file: Path) -> Mapping[str, Any]:
    """The state of training in a file."""
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{file} is not the state of a training in Megatron")
    version = value.get("checkpoint_version", _ORDER_OF_TODAY)
    if not isinstance(version, int | float) or version < _ORDER_OF_TODAY:
        raise CheckpointError(
            f"{file} has checkpoint_version {version}, with query, key and value in another order. {_RESAVE}"
        )
    return value


def _models(content: Mapping[str, Any], file: Path) -> Iterator[tuple[int, Any]]:
    """The chunks of a file by number."""
    found = [(int(each[1] or 0), content[name]) for name in content if (each := _CHUNK.fullmatch(str(name)))]
    if not found:
        raise CheckpointError(f"{file} has no model. Give a checkpoint that was saved without --no-save-model")
    yield from found


def _flat(value: Any) -> dict[str, Any]:
    """A nested state under dotted names; what is nested deeper than any model stays as it is."""
    flat: dict[str, Any] = {}
    found: list[tuple[str, Any]] = [("", value)]
    for _ in range(_MOST_LEVELS):
        flat |= {name: each for name, each in found if not isinstance(each, Mapping)}
        nested = [(name, each) for name, each in found if isinstance(each, Mapping)]
        found = [(f"{name}.{key}".lstrip("."), inner) for name, each in nested for key, inner in each.items()]
    return flat | dict(found)
