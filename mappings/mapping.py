"""A mapping: one Megatron pattern, its Hugging Face patterns, and a pure pair of join and split.

A subclass only defines how tensors are joined and split (`_join`, `_split`) and along which dim the Megatron side is
sharded (`shard_dim`). Names, communication and error messages are handled here, once: `megatron_to_hf` gathers the
shards through `Ranks` and joins them, `hf_to_megatron` splits. Programs that move many tensors call `join` and `split`
themselves and gather as they see fit (`bridge.live.bundle_stream`).

A mapping with wildcards is a declaration; `resolve(captures)` makes the mapping of one parameter from it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from amaxbridge.mappings.errors import MappingError
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.names import NamePattern, is_routed_expert, pattern
from amaxbridge.mappings.ranks import LOCAL, Axis, Ranks


@dataclass(frozen=True)
class MegatronParamMapping(ABC):
    """One Megatron parameter (or a pattern of them) and the Hugging Face tensors made from it.

    Args:
        megatron_param: global Megatron name, `*` for one number, `**` for any path.
        ranks: the ranks that `megatron_to_hf` and `hf_to_megatron` communicate with; see `on`.

    Raises:
        MappingError: there are no Hugging Face patterns, or they have other wildcards than the Megatron pattern.
    """

    megatron_param: str
    ranks: Ranks = field(default=LOCAL, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        wanted = sorted(self.pattern.wildcards)
        if not self.targets:
            raise MappingError(f"{type(self).__name__}: {self.megatron_param!r} has no Hugging Face name: give one")
        for target in self.targets:
            if sorted(pattern(target).wildcards) != sorted(wanted + self._extra_wildcards):
                raise MappingError(
                    f"{type(self).__name__}: {target!r} does not have the wildcards of {self.megatron_param!r}"
                    + (f" and one '{self._extra_wildcards[0]}' more" if self._extra_wildcards else "")
                )

    # Defined by subclasses.

    @property
    @abstractmethod
    def roles(self) -> Mapping[str, str]:
        """Role → Hugging Face name or pattern: `{"q": …, "k": …, "v": …}`; a single target has the role ""."""

    @property
    def shard_dim(self) -> int | None:
        """The dim of the Megatron tensor that is sharded over `axis`; None if every rank holds all of it."""
        return None

    @abstractmethod
    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]: ...

    @abstractmethod
    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor: ...

    _extra_wildcards: ClassVar[list[str]] = []  # of the Hugging Face side, beyond those of the Megatron side

    # Names.

    @property
    def pattern(self) -> NamePattern:
        """The compiled Megatron pattern."""
        return pattern(self.megatron_param)

    @property
    def targets(self) -> tuple[str, ...]:
        """All Hugging Face names or patterns of this mapping, in the order of their roles."""
        return tuple(self.roles.values())

    def resolve(self, captures: Sequence[str]) -> Self:
        """The mapping of one parameter. `captures` are in the order of the Megatron wildcards."""
        return self.rename(self.pattern.resolve(captures), lambda text: self.pattern.translate(captures, pattern(text)))

    def rename(self, megatron_param: str, hf_name: Callable[[str], str]) -> Self:
        """A copy under another Megatron name, with `hf_name` applied to every Hugging Face name."""
        changes: dict[str, Any] = {"megatron_param": megatron_param}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.metadata.get("hf_name"):
                changes[item.name] = hf_name(value) if isinstance(value, str) else _each(hf_name, value)
        return replace(self, **changes)

    def on(self, ranks: Ranks) -> Self:
        """A copy that communicates with `ranks`."""
        return replace(self, ranks=ranks)

    # Communication.

    @property
    def axis(self) -> Axis:
        """The mesh axis that shards this parameter: ETP inside routed experts, else TP."""
        return Axis.ETP if self.is_expert else Axis.TP

    @property
    def is_expert(self) -> bool:
        """True if the parameter lies inside the routed experts."""
        return is_routed_expert(self.megatron_param)

    def megatron_to_hf(self, megatron_weights: Tensor | None, megatron_module: Any) -> dict[str, Tensor]:
        """This rank's shard → all Hugging Face tensors, on every rank. Collective over `axis`.

        Args:
            megatron_weights: the shard of this rank; None on ranks that hold nothing of the parameter, as of another
                pipeline stage, which get nothing either.
            megatron_module: the module that owns it; its `config` is read.

        Raises:
            MappingError: the shards do not fit; names the parameter, the shapes and the rank.
        """
        if megatron_weights is None:
            return {}
        shards = [megatron_weights]
        if self.shard_dim is not None:
            shards = self.ranks.all_gather(self.axis, megatron_weights)
        return self.join(shards, ModelConfig.of_module(megatron_module))

    def hf_to_megatron(self, hf_weights: Tensor | Mapping[str, Tensor], megatron_module: Any) -> Tensor:
        """Hugging Face tensors → the shard of this rank. No communication.

        Args:
            hf_weights: tensors by role or by Hugging Face name, or the tensor itself if there is only one.
            megatron_module: the module that owns the parameter; its `config` is read.
        """
        if isinstance(hf_weights, Tensor):
            tensors = dict.fromkeys(self.targets, hf_weights)
        else:
            tensors = {self.roles.get(key, key): value for key, value in hf_weights.items()}
        config = ModelConfig.of_module(megatron_module)
        return self.split(tensors, config, self.ranks.rank(self.axis), self.ranks.size(self.axis))

    # The pure pair.

    def join(self, shards: Sequence[Tensor], config: object) -> dict[str, Tensor]:
        """All shards in rank order → {Hugging Face name: tensor}. Pure; works on meta tensors.

        Args:
            config: a ModelConfig, or anything that `ModelConfig.of` takes, such as Megatron's own configuration.

        Raises:
            MappingError: the shards do not fit the mapping or the configuration.
        """
        try:
            return self._join(shards, ModelConfig.of(config))
        except MappingError:
            raise
        except (ValueError, RuntimeError, AttributeError) as error:
            shapes = ", ".join(str(list(shard.shape)) for shard in shards)
            raise MappingError(
                f"{self.megatron_param}: {len(shards)} shard(s) of {self.axis} with shapes {shapes} "
                f"do not make {', '.join(self.targets)}: {error}"
            ) from error

    def split(self, tensors: Mapping[str, Tensor], config: object, rank: int, size: int) -> Tensor:
        """{Hugging Face name: tensor} → the shard of `rank` out of `size`. Pure.

        Raises:
            MappingError: a tensor is missing or does not fit.
        """
        missing = [name for name in self.targets if name not in tensors]
        if missing:
            raise MappingError(f"{self.megatron_param}: not given: {', '.join(missing)}")
        try:
            return self._split(tensors, ModelConfig.of(config), rank, size)
        except MappingError:
            raise
        except (ValueError, RuntimeError, AttributeError) as error:
            shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in self.targets)
            raise MappingError(
                f"{self.megatron_param}: {shapes} do not make shard {rank} of {size} on {self.axis}: {error}"
            ) from error


def hf_name(**kwargs: Any) -> Any:
    """Declares a dataclass field that holds a Hugging Face name or pattern, or several."""
    return field(metadata={"hf_name": True}, **kwargs)


def _each(function: Callable[[str], str], names: Mapping[str, str] | Sequence[str]) -> Any:
    if isinstance(names, Mapping):
        return {role: function(name) for role, name in names.items()}
    return [function(name) for name in names]
