"""Quantizer amax: the same names as the weights, another suffix.

An amax comes in three granularities. A per-tensor amax (one number) is replicated: the maximum over the ranks
that share the module goes to every Hugging Face name made from the parameter. Upstream synchronization is never
trusted: after training the ranks may differ. A per-channel (`[out, 1]`) or per-block (`[out, blocks]`) amax
follows its weight, with the weight's own join and split; a dim that the reduction collapsed to 1 is not
sharded, so the maximum over the ranks is taken. Where a rank has only one block along a dim, `[out, blocks, 1]` tells
it from such a dim.

`convert_to_amax_map` derives amax mappings from weight mappings; the families never spell them out. A derived
mapping remembers the weight mapping that it `follows`; a mapping made by hand only handles per-tensor amax.
On import, several Hugging Face values for one Megatron quantizer become their maximum.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from amaxbridge.mappings.errors import MappingError
from amaxbridge.mappings.mapping import MegatronParamMapping, hf_name
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.names import pattern
from amaxbridge.mappings.ranks import Axis
from amaxbridge.mappings.tensors import join_dim, max_of, shard_of
from amaxbridge.mappings.weights import ReplicatedMapping

WEIGHT_QUANTIZER = ".weight_quantizer._amax"
LEARNED_POST = ".weight_quantizer._amax_post"
LEARNED_PRE = ".weight_quantizer._amax_pre"
GLOBAL_AMAX = ".weight_quantizer._global_amax"
INPUT_QUANTIZER = ".input_quantizer._amax"
PRE_QUANT_SCALE = ".input_quantizer._pre_quant_scale"
OUTPUT_QUANTIZER = ".output_quantizer._amax"
STORED_SCALES = ".weight_quantizer.stored_scales"
"""The scales of a weight that training keeps as codes and scales; not a ModelOpt buffer."""


@dataclass(frozen=True)
class AmaxMapping(ReplicatedMapping):
    """The amax of one Megatron quantizer under one Hugging Face name, or under several by role.

    Args:
        megatron_param: e.g. `decoder.layers.*.mlp.linear_fc2.weight_quantizer._amax`.
        hf_param: e.g. `model.layers.*.mlp.down_proj.weight_quantizer._amax`.
        follows: the mapping of the weight, whose join and split a per-channel or per-block amax uses.
    """

    hf_param: str | dict[str, str] = hf_name()  # type: ignore[assignment]
    follows: MegatronParamMapping | None = field(default=None, kw_only=True, repr=False, compare=False)

    @property
    def roles(self) -> dict[str, str]:
        return {"": self.hf_param} if isinstance(self.hf_param, str) else dict(self.hf_param)

    @property
    def shard_dim(self) -> int:
        return 0  # reduced (per-tensor) or joined (per-channel): either way the shards of all ranks are needed

    def resolve(self, captures: Sequence[str]) -> Self:
        return replace(super().resolve(captures), follows=self.follows and self.follows.resolve(captures))

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        if all(shard.numel() == 1 for shard in shards):
            return dict.fromkeys(self.targets, _max_scalar(shards))
        weight = self._weight_mapping()
        if self._follows_columns:
            columns = join_dim(shards, 0) if weight.shard_dim == 1 else max_of(shards)
            return dict.fromkeys(self.targets, columns.float())
        of_blocks = shards[0].ndim == 3
        collapsed = weight.shard_dim is not None and any(shard.shape[weight.shard_dim] == 1 for shard in shards)
        if weight.shard_dim is None or (collapsed and not of_blocks):
            shards = [max_of(shards)]
        parts = weight.join([shard.float() for shard in shards], config).values()
        return dict(zip(self.targets, (part.squeeze(2) if of_blocks else part for part in parts), strict=True))

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        values = [tensors[name] for name in self.targets]
        if all(value.numel() == 1 for value in values):
            return _max_scalar(values)
        weight = self._weight_mapping()
        if self._follows_columns:
            return shard_of(max_of(values), 0, rank, size) if weight.shard_dim == 1 else max_of(values)
        if weight.shard_dim is not None and values[0].shape[weight.shard_dim] == 1:
            rank, size = 0, 1
        return weight.split(dict(zip(weight.targets, values, strict=True)), config, rank, size)

    @property
    def _follows_columns(self) -> bool:
        """An input quantizer's vector, `[in]` (`_pre_quant_scale`), follows the columns of the weight."""
        return ".input_quantizer." in self.megatron_param

    def _weight_mapping(self) -> MegatronParamMapping:
        if self.follows is None:
            raise ValueError(
                "only a per-tensor amax can be mapped by names alone; "
                "derive this mapping from its weight mapping with convert_to_amax_map"
            )
        return self.follows


@dataclass(frozen=True)
class CacheAmaxMapping(AmaxMapping):
    """The amax of a key-value cache's quantizer: one number, or `[heads]`, which tensor parallelism divides."""

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        heads = all(shard.ndim for shard in shards)
        return {name: join_dim(shards, 0) if heads else _max_scalar(shards) for name in self.targets}

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        (amax,) = tensors.values()
        return shard_of(amax, 0, rank, size) if amax.ndim else amax


@dataclass(frozen=True)
class AmaxFanoutMapping(AmaxMapping):
    """One Megatron amax under several Hugging Face names: q/k/v of a fused QKV, gate/up of a gated MLP.

    Args:
        megatron_param: e.g. `decoder.layers.*.self_attention.linear_qkv.weight_quantizer._amax`.
        hf_params: e.g. the `weight_quantizer._amax` of q_proj, k_proj and v_proj.
    """

    hf_param: str = field(init=False, repr=False, compare=False)
    """The first of `hf_params`."""
    hf_params: list[str] = hf_name()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "hf_param", self.hf_params[0])

    @property
    def hf_targets(self) -> list[str]:
        """Every Hugging Face name that this amax is written to and read from."""
        return list(self.hf_params)

    @property
    def roles(self) -> dict[str, str]:
        return {name: name for name in self.hf_params}


@dataclass(frozen=True)
class MoeAmaxFanoutMapping(AmaxMapping):
    """One quantizer for an expert-parallel rank's whole block of local experts, fanned out to each expert's name.

    The ranks of EP hold consecutive equal blocks of experts: of 8 experts at EP=2 the first rank's amax goes to
    experts 0 to 3. `join` takes one amax per EP rank, `split` gives a rank the maximum over its block.

    Args:
        megatron_param: e.g. `decoder.layers.*.mlp.experts.linear_fc1.weight_quantizer._amax`.
        hf_patterns: names with one `*` more than `megatron_param`, the expert.
        num_experts: number of experts over all EP ranks; default: `num_moe_experts`, `num_experts` or
            `n_routed_experts` of the config or module.
    """

    hf_param: dict[str, str] = field(init=False, default_factory=dict, repr=False, compare=False)
    hf_patterns: list[str] = hf_name()
    num_experts: int | None = None

    _extra_wildcards: ClassVar[list[str]] = ["*"]
    _EXPERT_WILDCARD_RE: ClassVar[re.Pattern[str]] = re.compile(r"(?<=\.experts\.)\*(?=\.)")

    @property
    def axis(self) -> Axis:
        return Axis.EP

    @property
    def is_expert(self) -> bool:
        """False: the quantizer is one of a rank, not of an expert."""
        return False

    @property
    def roles(self) -> dict[str, str]:
        return {name: name for name in self.hf_patterns}

    def _get_num_experts(self, megatron_module: object | None) -> int | None:
        """The number of experts over all EP ranks; None if neither the mapping nor the module says it."""
        return self.num_experts or ModelConfig.of_module(megatron_module).num_moe_experts

    def megatron_to_hf(self, megatron_weights: Tensor | None, megatron_module: Any) -> dict[str, Tensor]:
        if megatron_weights is None:
            return {}
        amax = self.ranks.all_reduce_max(Axis.ETP, megatron_weights.float())
        return self.join(self.ranks.all_gather(Axis.EP, amax), ModelConfig.of_module(megatron_module))

    def hf_to_megatron(self, hf_weights: Tensor | Mapping[str, Tensor], megatron_module: Any) -> Tensor:
        if isinstance(hf_weights, Tensor):
            return hf_weights
        config = ModelConfig.of_module(megatron_module)
        return self.split(hf_weights, config, self.ranks.rank(Axis.EP), self.ranks.size(Axis.EP))

    def split(self, tensors: Mapping[str, Tensor], config: object, rank: int, size: int) -> Tensor:
        return self.for_experts(self.block(rank, size, ModelConfig.of(config))).split(tensors, config, 0, 1)

    def for_experts(self, experts: Iterable[int]) -> "AmaxFanoutMapping":
        """The fan-out of one such quantizer to the names of these experts, wherever expert parallelism placed them."""
        names = [pattern(target).resolve([str(expert)]) for expert in experts for target in self.hf_patterns]
        return AmaxFanoutMapping(self.megatron_param, names)

    def block(self, rank: int, size: int, config: ModelConfig) -> range:
        """The global numbers of the experts that share the quantizer of EP rank `rank` out of `size`.

        Raises:
            MappingError: the number of experts is unknown or does not divide by `size`.
        """
        experts = self.num_experts or config.num_moe_experts
        if not experts:
            raise MappingError(f"{self.megatron_param}: unknown number of experts; give num_experts=")
        if experts % size:
            raise MappingError(
                f"{self.megatron_param}: {experts} experts do not divide into {size} equal blocks of EP; "
                "nothing says which experts share a quantizer then: give each expert its own"
            )
        return range(rank * experts // size, (rank + 1) * experts // size)

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        if any(shard.numel() != 1 for shard in shards):
            raise ValueError("a quantizer shared by several experts must be per-tensor")
        return {
            name: shard.float().reshape(())
            for rank, shard in enumerate(shards)
            for name in self.for_experts(self.block(rank, len(shards), config)).targets
        }


@dataclass(frozen=True)
class StoredScalesMapping(MegatronParamMapping):
    """The scales of a weight stored as codes, one row of scales for each row of codes; mapped exactly as the weight.

    Args:
        hf_params: the name of the scales of each Hugging Face weight, `….q_proj.weight_quantizer.stored_scales`.
        follows: the mapping of the weight.
    """

    hf_params: list[str] = hf_name()
    follows: MegatronParamMapping = field(kw_only=True, repr=False, compare=False)

    @property
    def roles(self) -> Mapping[str, str]:
        return {name: name for name in self.hf_params}

    @property
    def shard_dim(self) -> int | None:
        return self.follows.shard_dim

    def resolve(self, captures: Sequence[str]) -> Self:
        return replace(super().resolve(captures), follows=self.follows.resolve(captures))

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        return dict(zip(self.targets, self.follows.join(shards, config).values(), strict=True))

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        named = dict(zip(self.follows.targets, (tensors[name] for name in self.targets), strict=True))
        return self.follows.split(named, config, rank, size)


def stored_scales_name(weight: str) -> str:
    """The name of a weight's scales. `weight` is its canonical Megatron name, `….weight` or `….weight3`."""
    stem, _, ending = weight.rpartition(".")
    quantizer, _, scales = STORED_SCALES.rpartition(".")
    expert = ending.removeprefix("weight")
    return f"{stem}{quantizer}{expert and '.'}{expert}.{scales}"


def stored_scales_map(mappings: Iterable[MegatronParamMapping]) -> Iterator[MegatronParamMapping]:
    """The scale mappings that follow from weight mappings. An expert's scales are named like its own quantizer."""
    for mapping in mappings:
        names = _quantizer_names(mapping, STORED_SCALES)
        if names and mapping.megatron_param.endswith((".weight", ".weight*")):
            yield StoredScalesMapping(stored_scales_name(mapping.megatron_param), names, follows=mapping)


def _max_scalar(tensors: Sequence[Tensor]) -> Tensor:
    return max_of([tensor.reshape(()) for tensor in tensors])


def convert_to_amax_map(
    mappings: Iterable[MegatronParamMapping], mapped_name: str = WEIGHT_QUANTIZER
) -> list[MegatronParamMapping]:
    """The amax mappings that follow from weight mappings.

    - A Megatron name that ends in `.weight` gives an `AmaxMapping`, or an `AmaxFanoutMapping` where the weight is
      fused from several Hugging Face tensors.
    - A Megatron name that ends in `.weight*` (grouped experts) gives a `MoeAmaxFanoutMapping`: one quantizer for
      the local block of experts.
    - All other mappings (biases, fused norms, buffers) have no quantizer and are skipped.

    Args:
        mapped_name: what replaces `.weight`, with its leading dot.
    """
    made: list[MegatronParamMapping] = []
    for mapping in mappings:
        stem, _, ending = mapping.megatron_param.rpartition(".")
        names = _quantizer_names(mapping, mapped_name)
        if names and ending == "weight":
            made.append(_one_quantizer(stem + mapped_name, names, mapping))
        elif names and ending == "weight*":
            made.append(MoeAmaxFanoutMapping(stem + mapped_name, names))
    return made


def per_expert_amax_map(
    mappings: Iterable[MegatronParamMapping], mapped_name: str = WEIGHT_QUANTIZER
) -> list[MegatronParamMapping]:
    """The amax mappings of experts with a quantizer each: `weight*` → `weight_quantizer.*._amax`.

    ModelOpt's other layout for grouped experts, beside the shared quantizer of `convert_to_amax_map`. Sequential
    experts have the same canonical names (`mappings.canonical`).
    """
    quantizer, _, buffer = mapped_name.rpartition(".")
    return [
        _one_quantizer(f"{mapping.megatron_param.removesuffix('.weight*')}{quantizer}.*.{buffer}", names, mapping)
        for mapping in mappings
        if mapping.megatron_param.endswith(".weight*") and (names := _quantizer_names(mapping, mapped_name))
    ]


def _quantizer_names(mapping: MegatronParamMapping, mapped_name: str) -> list[str]:
    return [name.removesuffix(".weight") + mapped_name for name in mapping.targets if name.endswith(".weight")]


def _one_quantizer(megatron_param: str, names: list[str], weight: MegatronParamMapping) -> MegatronParamMapping:
    if len(names) > 1:
        return AmaxFanoutMapping(megatron_param, names, follows=weight)
    return AmaxMapping(megatron_param, names[0], follows=weight)
