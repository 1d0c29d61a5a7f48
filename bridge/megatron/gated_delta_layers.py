"""Layers with a gated delta net in place of attention; Megatron ships their spec for Transformer Engine only.

GatedDeltaNet is Megatron-Core's own. It needs flash-linear-attention to be built, on a CPU too.
"""

from dataclasses import replace

from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec

from amaxbridge.bridge.megatron.zero_centred_norms import ZeroCentredRMSNorm


def with_gated_delta_net(layer: ModuleSpec) -> ModuleSpec:
    """The spec of a layer, with a gated delta net in place of its attention.

    In checkpoints, norms have the names that Transformer Engine's layers give them.
    """
    parts = GatedDeltaNetSubmodules(
        in_proj=ColumnParallelLinear, out_norm=ZeroCentredRMSNorm, out_proj=RowParallelLinear
    )
    names = {**layer.submodules.sharded_state_dict_keys_map, "input_layernorm.": "self_attention.in_proj.layer_norm_"}
    submodules = replace(
        layer.submodules,
        self_attention=ModuleSpec(module=GatedDeltaNet, submodules=parts),
        sharded_state_dict_keys_map=names,
    )
    return replace(layer, submodules=submodules)
