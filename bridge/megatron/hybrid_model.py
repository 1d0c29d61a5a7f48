"""Building a HybridModel from Megatron-Core's own layers; Megatron ships layer specs for Transformer Engine only.

Attention and MLP layers are the two halves of GPTModel's layer. In checkpoints, norms have the names that
Transformer Engine's layers give them, so that checkpoints of either load into both.
"""

from dataclasses import fields, replace
from typing import Any

from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import MoETransformerLayer

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.megatron.gated_delta_layers import with_gated_delta_net
from amaxbridge.bridge.megatron.mamba_in_torch import mixer_class
from amaxbridge.bridge.megatron.multipliers import MULTIPLIERS
from amaxbridge.bridge.megatron.zero_centred_norms import ZeroCentredRMSNorm
from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.hybrid_layers import with_stages


class LocalHybridStack(HybridStack):  # type: ignore[misc]  # Megatron is not typed
    """Megatron's stack of layers, with a final norm of this package or torch in place of Transformer Engine's."""

    def __init__(self, config: TransformerConfig, submodules: Any, *, post_layer_norm: bool = True, **kw: Any) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **kw)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = _norm(config)(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


def _norm(config: TransformerConfig) -> Any:
    """The norm that Megatron-Core's own layers of this configuration have."""
    return ZeroCentredRMSNorm if config.layernorm_zero_centered_gamma else WrappedTorchNorm


def build_hybrid_chunk(
    hf: HFModel, config: TransformerConfig, vp_stage: int | None, *, dense: ModuleSpec, sparse: ModuleSpec
) -> HybridModel:
    """One model chunk of this rank; the decoder layers are divided evenly between pipeline stages.

    Args:
        dense: GPTModel's layer with an MLP.
        sparse: the same with experts.

    Raises:
        UsageError: HybridModel does not compute what the model does.
    """
    check_hybrid(hf)
    pattern = hf.family.layer_pattern(hf.config)
    mixer = mixer_class(config) if "M" in pattern else MambaMixer
    stages = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    arguments = hf.family.model_arguments(hf.config)
    arguments["vocab_size"] += -arguments["vocab_size"] % config.tensor_model_parallel_size
    for scaling in ("rope_scaling", "rope_scaling_factor"):
        arguments.pop(scaling, None)
    return HybridModel(
        config,
        ModuleSpec(module=LocalHybridStack, submodules=_layers(dense, sparse.submodules, mixer, _norm(config))),
        hybrid_layer_pattern=with_stages(pattern, stages),
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        vp_stage=vp_stage,
        **arguments,
    )


def check_hybrid(hf: HFModel) -> None:
    """Raises UsageError if a HybridModel would compute something else than the model, or has no place for it.

    Its layers have numbers of their own, so lists with an entry for each of GPTModel's layers mean others there.
    """
    family = hf.family
    settings = {**family.model_arguments(hf.config), **family.layer_settings(hf.config), **family.constants}
    lacks = {
        "a scaled rotary embedding (rope_type llama3)": settings.get("rope_scaling"),
        "a rotary embedding of neighbouring columns (rotary_interleaved)": settings.get("rotary_interleaved"),
        "norms after attention and MLP": family.has_in_layers("post_mlp_layernorm"),
        **{name: settings.get(name) for name in MULTIPLIERS},
        **{f"{name} by layer": isinstance(value, list) for name, value in settings.items()},
    }
    if missing := [what for what, needed in lacks.items() if needed]:
        raise UsageError(
            f"Megatron's HybridModel lacks {', '.join(missing)}, which {', '.join(family.architectures)} needs: build "
            "its GPTModel (model.model_class=gpt)"
        )


def _layers(
    layer: ModuleSpec, sparse: TransformerLayerSubmodules, mixer: type[MambaMixer], norm: Any
) -> HybridStackSubmodules:
    """The spec of every kind of layer. Norms that Transformer Engine fuses get the fused name on the disk."""
    dense, delta = layer.submodules, with_gated_delta_net(layer).submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=dense.input_layernorm,
        self_attention=dense.self_attention,
        self_attn_bda=dense.self_attn_bda,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=dense.pre_mlp_layernorm,
        mlp=dense.mlp,
        mlp_bda=dense.mlp_bda,
        sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    )
    moe = TransformerLayerSubmodules(pre_mlp_layernorm=sparse.pre_mlp_layernorm, mlp=sparse.mlp, mlp_bda=sparse.mlp_bda)
    projections = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    mamba = MambaLayerSubmodules(
        norm=WrappedTorchNorm,
        mixer=ModuleSpec(module=mixer, submodules=projections),
        mamba_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
    )
    around_mtp = MultiTokenPredictionLayerSubmodules(
        enorm=norm, hnorm=norm, eh_proj=ColumnParallelLinear, layer_norm=norm
    )
    mtp = MultiTokenPredictionBlockSubmodules(
        layer_specs=[ModuleSpec(module=MultiTokenPredictionLayer, submodules=around_mtp)]
    )
    fused_norm = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    delta_net = TransformerLayerSubmodules(
        input_layernorm=delta.input_layernorm,
        self_attention=delta.self_attention,
        self_attn_bda=delta.self_attn_bda,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.in_proj.layer_norm_"},
    )
    latent = {"mla_layer": ModuleSpec(module=TransformerLayer, submodules=attention)}
    if not latent.keys() <= {field.name for field in fields(HybridStackSubmodules)}:
        latent = {}  # megatron-core 0.18 has no such layers
    return HybridStackSubmodules(
        attention_layer=ModuleSpec(
            module=TransformerLayer, submodules=replace(attention, sharded_state_dict_keys_map=fused_norm)
        ),
        gdn_layer=ModuleSpec(module=TransformerLayer, submodules=delta_net),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=moe),
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
        mtp_block_spec=ModuleSpec(module=MultiTokenPredictionBlock, submodules=mtp),
        **latent,
    )
