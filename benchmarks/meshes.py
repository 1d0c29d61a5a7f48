"""A model that is only parameters: the shards of any rank of any mesh, cut from Hugging Face tensors by the mappings.

It lets the traffic of an export be measured, and its laws be tested, at sizes and topologies that no Megatron model is
built for here. Values come from a hash of the Hugging Face name, so that a wrong expert, layer or shard shows.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from amaxbridge.bridge.live.model_walk import Parameter
from amaxbridge.bridge.plan.mesh import Mesh
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.names import is_routed_expert
from amaxbridge.mappings.ranks import Axis
from amaxbridge.mappings.registry import MappingRegistry


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder in the names of the Qwen3 families; `experts` of 0 makes it dense."""

    layers: int = 2
    hidden: int = 32
    ffn: int = 64
    heads: int = 4
    groups: int = 2
    head_dim: int = 16
    vocab: int = 64
    experts: int = 0

    @property
    def config(self) -> SimpleNamespace:
        return SimpleNamespace(
            num_attention_heads=self.heads,
            num_query_groups=self.groups,
            kv_channels=self.head_dim,
            vocab_size=self.vocab,
            num_moe_experts=self.experts or None,
        )

    def shape(self, hf_name: str) -> tuple[int, ...]:
        """Shape of a Hugging Face tensor."""
        projection = hf_name.split(".")[-2]
        widths = {
            "embed_tokens": (self.vocab, self.hidden),
            "lm_head": (self.vocab, self.hidden),
            "q_proj": (self.heads * self.head_dim, self.hidden),
            "k_proj": (self.groups * self.head_dim, self.hidden),
            "v_proj": (self.groups * self.head_dim, self.hidden),
            "o_proj": (self.hidden, self.heads * self.head_dim),
            "gate_proj": (self.ffn, self.hidden),
            "up_proj": (self.ffn, self.hidden),
            "down_proj": (self.hidden, self.ffn),
            "gate": (self.experts, self.hidden),
            "q_norm": (self.head_dim,),
            "k_norm": (self.head_dim,),
        }
        return widths.get(projection, (self.hidden,))

    def tensor(self, hf_name: str) -> Tensor:
        """A Hugging Face tensor, the same in every process."""
        seed = int.from_bytes(hashlib.sha256(hf_name.encode()).digest()[:6], "little")
        return torch.randn(self.shape(hf_name), generator=torch.Generator().manual_seed(seed)).bfloat16()

    def names(self, mesh: Mesh, rank: int) -> Iterator[str]:
        """Global Megatron names of the parameters that a rank holds."""
        stage, stages = rank // (mesh.tp * mesh.dp), mesh.pp
        if stage == 0:
            yield "embedding.word_embeddings.weight"
        for layer in range(self.layers * stage // stages, self.layers * (stage + 1) // stages):
            prefix = f"decoder.layers.{layer}"
            yield from (f"{prefix}.{norm}.weight" for norm in ("input_layernorm", "pre_mlp_layernorm"))
            attention = f"{prefix}.self_attention"
            yield from (
                f"{attention}.{name}.weight" for name in ("linear_qkv", "linear_proj", "q_layernorm", "k_layernorm")
            )
            if not self.experts:
                yield from (f"{prefix}.mlp.{name}.weight" for name in ("linear_fc1", "linear_fc2"))
                continue
            yield f"{prefix}.mlp.router.weight"
            position = rank // mesh.etp % mesh.ep
            for expert in range(self.experts * position // mesh.ep, self.experts * (position + 1) // mesh.ep):
                yield from (f"{prefix}.mlp.experts.{name}.weight{expert}" for name in ("linear_fc1", "linear_fc2"))
        if stage == stages - 1:
            yield from ("decoder.final_layernorm.weight", "output_layer.weight")

    def parameters(self, mesh: Mesh, rank: int, registry: MappingRegistry) -> dict[str, Tensor]:
        """The shards of a rank by global Megatron name."""
        found = {}
        for name in self.names(mesh, rank):
            mapping = registry.megatron_to_hf_lookup(name)
            assert mapping is not None, name
            found[name] = self._shard(mapping, mesh, rank).clone()
        return found

    def _shard(self, mapping: MegatronParamMapping, mesh: Mesh, rank: int) -> Tensor:
        size = mesh.etp if is_routed_expert(mapping.megatron_param) else mesh.tp
        tensors = {target: self.tensor(target) for target in mapping.targets}
        return mapping.split(tensors, self.config, rank % size, size)


def process_groups(mesh: Mesh, rank: int) -> dict[Axis, dist.ProcessGroup]:
    """The process groups of a rank. Collective: every rank makes every group, in the same order."""
    groups = {}
    for axis, members in mesh.groups().items():
        for ids in members:
            group = dist.new_group(ids)
            if rank in ids:
                groups[axis] = group
    return groups


def as_parameters(tensors: Mapping[str, Tensor]) -> list[Parameter]:
    return [Parameter(name, tensor) for name, tensor in tensors.items()]
