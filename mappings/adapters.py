"""Adapters (LoRA, DoRA): which weight they change, and what they are on the Hugging Face side.

An adapter adds `scale · B · A` to a weight; DoRA also gives each row of the sum a length of its own. Training keeps the
parts beside the linear, in the spelling of the framework:

    Megatron-Bridge, NeMo   …linear_fc1.adapter.linear_in.weight             A, `[rank, in]`
                            …linear_fc1.adapter.linear_out.weight            B, `[out, rank]`
                            …linear_fc1.adapter.weight_magnitude             DoRA, `[out]`
                            …linear_qkv.adapter.adapter_q.linear_in.weight   of the queries alone: adapter_q, _k, _v,
                                                                             and of linear_fc1 adapter_gate, _up
    ModelOpt                …linear_fc1.lora_a_NAME.weight, lora_b_NAME.weight

Canonical names of an expert's end in its number: `…experts.linear_fc1.adapter.linear_in.weight3`.

On the Hugging Face side each part has PEFT's name beside the weight that it changes: `….q_proj.lora_A.weight`. Where
Megatron fuses several weights, they share A, and B and the lengths are taken apart as the rows of the weight are; so an
adapter needs no table of its own. Shards follow the framework's modules:

                            A                       B                      lengths
    Megatron-Bridge, NeMo   rank, or the inputs     outputs                outputs, or whole
                            of a row-parallel one                          in a row-parallel one
    ModelOpt                whole, or the inputs    outputs, or whole
                            of a row-parallel one   in a row-parallel one

Sources: megatron.bridge.peft (utils.ParallelLinearAdapter, dora_layers, canonical_lora) of August 2026;
modelopt.torch.peft.lora.plugins.megatron, 0.47.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from amaxbridge.mappings.errors import MappingError
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.names import module_of
from amaxbridge.mappings.registry import MappingRegistry
from amaxbridge.mappings.tensors import join_dim, shard_of

_OF_BRIDGE = re.compile(
    r"(?P<module>.+)\.(?P<adapter>adapter(?:\.adapter_(?P<role>q|k|v|gate|up))?)\."
    r"(?P<side>linear_in\.weight|linear_out\.weight|weight_magnitude)(?P<expert>\d*)"
)
_OF_MODELOPT = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ab])_(?P<adapter>\w+)\.weight(?P<expert>\d*)")
_ANY = re.compile(r"\.adapter\w*\.|\.lora_[abAB]\w*\.")
_OF_PEFT = re.compile(r"\.(?:lora_A|lora_B|lora_magnitude_vector)$")


NEXT_STEP = "adapter=merge writes the weights with them merged in, and adapter=only writes them alone, for PEFT"
"""What the user of a model with adapters can do."""


class Side(StrEnum):
    """The parts of an adapter, by PEFT's names."""

    A = "lora_A"
    B = "lora_B"
    LENGTHS = "lora_magnitude_vector"


_SIDES = {
    "linear_in.weight": Side.A,
    "linear_out.weight": Side.B,
    "weight_magnitude": Side.LENGTHS,
    "a": Side.A,
    "b": Side.B,
}


@dataclass(frozen=True, slots=True)
class AdapterTensor:
    """What the name of an adapter's tensor says.

    Args:
        weight: the Megatron weight that it changes.
        adapter: names the adapter: the parts with one name belong together, and have one scale.
        side: which part it is.
        role: of the weights that are fused in Megatron's, the one that it changes; "" for all.
        label: ModelOpt's name of the adapter; "" in the other spelling.
    """

    weight: str
    adapter: str
    side: Side
    role: str
    label: str

    @property
    def of_all_experts(self) -> str:
        """The adapter without the number of an expert."""
        return self.adapter.rstrip("0123456789").rstrip(".")


def is_adapter(megatron_name: str) -> bool:
    """True for a tensor or quantizer inside an adapter, known or not."""
    return _ANY.search(megatron_name) is not None


def adapter_tensor(megatron_name: str) -> AdapterTensor | None:
    """What a canonical name says; None if it is not that of an adapter's tensor."""
    if found := _OF_BRIDGE.fullmatch(megatron_name):
        role, label = found["role"] or "", ""
    elif found := _OF_MODELOPT.fullmatch(megatron_name):
        role, label = "", found["adapter"]
    else:
        return None
    expert, owner = found["expert"], f"{found['module']}.{found['adapter']}"
    weight = f"{found['module']}.weight{expert}"
    return AdapterTensor(weight, owner + (expert and f".{expert}"), _SIDES[found["side"]], role, label)


def adapter_name(weight: str, side: Side) -> str:
    """The Hugging Face name of a part, beside the weight that it changes."""
    return f"{module_of(weight)}.{side}.weight"


def without_side(module: str) -> str:
    """The module that an adapter's part belongs to; other modules stay."""
    return _OF_PEFT.sub("", module)


@dataclass(frozen=True)
class AdapterMapping(MegatronParamMapping):
    """A part of an adapter ↔ PEFT's parts beside the Hugging Face weights.

    Args:
        follows: the mapping of the weight that it changes.
        tensor: what its name says.
    """

    follows: MegatronParamMapping
    tensor: AdapterTensor

    @property
    def roles(self) -> dict[str, str]:
        only = self.tensor.role
        changed = {role: weight for role, weight in self.follows.roles.items() if only in ("", role)}
        return {role: adapter_name(weight, self.tensor.side) for role, weight in changed.items()}

    @property
    def shard_dim(self) -> int | None:
        of_weight, side = self.follows.shard_dim, self.tensor.side
        if side is Side.A:
            return 1 if of_weight == 1 else None if self.tensor.label else 0
        if side is Side.B and not self.tensor.label:
            return 0
        return 0 if of_weight == 0 else None

    def _join(self, shards: Sequence[Tensor], config: ModelConfig) -> dict[str, Tensor]:
        if self.tensor.side is Side.A or self.tensor.role:
            return dict.fromkeys(self.targets, join_dim(shards, self.shard_dim))
        rows = shards if self.follows.shard_dim == 0 else [join_dim(shards, self.shard_dim)]
        return dict(zip(self.targets, self.follows._join(rows, config).values(), strict=True))

    def _split(self, tensors: Mapping[str, Tensor], config: ModelConfig, rank: int, size: int) -> Tensor:
        if self.tensor.side is Side.A or self.tensor.role:
            return shard_of(tensors[self.targets[0]], self.shard_dim, rank, size)
        rows = {weight: tensors[adapter_name(weight, self.tensor.side)] for weight in self.follows.targets}
        if self.follows.shard_dim == 0:
            return self.follows._split(rows, config, rank, size)
        return shard_of(self.follows._split(rows, config, 0, 1), self.shard_dim, rank, size)


class AdaptedRegistry(MappingRegistry):
    """A registry that also finds the adapters of the weights that it knows."""

    def __init__(self, registry: MappingRegistry) -> None:
        vars(self).update(vars(registry))

    def megatron_to_hf_lookup(self, megatron_param_name: str) -> MegatronParamMapping | None:
        """As in `MappingRegistry`.

        Raises:
            MappingError: an adapter changes a part of a weight that the Hugging Face files do not have by itself.
        """
        tensor = adapter_tensor(megatron_param_name)
        if tensor is None:
            return super().megatron_to_hf_lookup(megatron_param_name)
        weight = super().megatron_to_hf_lookup(tensor.weight)
        if weight is None:
            return None
        if tensor.role and tensor.role not in weight.roles:
            raise MappingError(
                f"{megatron_param_name} changes a part of {tensor.weight}, which the files hold in one tensor, "
                f"{', '.join(weight.targets)}: train one adapter for all of it (LoRA in place of CanonicalLoRA)"
            )
        return AdapterMapping(megatron_param_name, weight, tensor)
