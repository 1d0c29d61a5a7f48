"""The tiny models of Transformer Engine whose checkpoints are fixtures: what each is, how it is trained and cut."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

type Recipe = Literal["delayed", "tensorwise", "blockwise"]

VOCABULARY = 67
"""Odd, so that TP=2 must pad it."""

_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.08,
}
_ONE_LAYER: Mapping[str, Any] = {"num_hidden_layers": 1, "tie_word_embeddings": True}
_EXPERTS: Mapping[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
_BLOCKS: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 128,
    **_ONE_LAYER,
}
"""Every cut between q, k and v, and between gate and up, falls on a bound between blocks of 128."""
_BLOCKS_CUT: Mapping[str, Any] = {
    **_BLOCKS,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
"""Megatron's rows are q0 k0, v0 q1, k1 v1 in blocks of 128, so that q, k and v each lie in two of them."""
_LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_nextn_predict_layers": 0,
}
_NEMOTRON_H: Mapping[str, Any] = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and what training does with it.

    Args:
        architecture: Hugging Face's.
        sizes: fields of config.json in which it differs from `_SIZES`.
        qat: trained on with ModelOpt's NVFP4 quantizers.
        cache: FP8 quantizers of the key-value cache too.
        grouped: experts are one grouped linear each (`TEGroupedMLP`), else a module each.
        hybrid: HybridModel in place of GPTModel.
        fp8: the recipe of FP8 training.
        fp8_parameters: parameters themselves are FP8, as `--fp8-param-gather` has it.
        fp32: parameters are fp32, else bf16.
        tp, ep: tensor- and expert-parallel size; one is 1.
    """

    architecture: str = "Qwen3ForCausalLM"
    sizes: Mapping[str, Any] = MappingProxyType({})
    qat: bool = False
    cache: bool = False
    grouped: bool = True
    hybrid: bool = False
    fp8: Recipe | None = None
    fp8_parameters: bool = False
    fp32: bool = False
    tp: int = 1
    ep: int = 1

    @property
    def processes(self) -> int:
        """Number of processes of the run, one for each GPU."""
        return self.tp * self.ep

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of config.json."""
        return {**_SIZES, **self.sizes}


_TWO_RANKS: Mapping[str, Any] = {**_ONE_LAYER, "intermediate_size": 96}
_MOE: Mapping[str, Any] = {"architecture": "Qwen3MoeForCausalLM", "sizes": _EXPERTS}
_MOE_ONE_LAYER: Mapping[str, Any] = {"architecture": "Qwen3MoeForCausalLM", "sizes": {**_EXPERTS, **_ONE_LAYER}}
_MOE_BLOCKS: Mapping[str, Any] = {
    "architecture": "Qwen3MoeForCausalLM",
    "sizes": {**_EXPERTS, **_BLOCKS, "num_experts": 2, "moe_intermediate_size": 128},
}

CASES: Mapping[str, Case] = {
    "dense": Case(),
    "dense_nvfp4": Case(qat=True),
    "dense_fp32_nvfp4": Case(qat=True, fp32=True, sizes=_ONE_LAYER),
    "cache_nvfp4": Case(qat=True, cache=True, sizes={**_ONE_LAYER, "intermediate_size": 16}),
    "grouped": Case(**_MOE),
    "grouped_nvfp4": Case(**_MOE, qat=True),
    "sequential": Case(**_MOE_ONE_LAYER, grouped=False),
    "sequential_nvfp4": Case(**_MOE_ONE_LAYER, grouped=False, qat=True),
    "latent_nvfp4": Case("DeepseekV3ForCausalLM", _LATENT, qat=True),
    "hybrid": Case("LlamaForCausalLM", _ONE_LAYER, hybrid=True),
    "hybrid_nvfp4": Case("LlamaForCausalLM", hybrid=True, qat=True),
    "nemotron_h_nvfp4": Case("NemotronHForCausalLM", _NEMOTRON_H, hybrid=True, qat=True),
    "fp8_delayed": Case(sizes=_ONE_LAYER, fp8="delayed"),
    "fp8_tensorwise": Case(sizes=_ONE_LAYER, fp8="tensorwise"),
    "fp8_blockwise": Case(sizes=_ONE_LAYER, fp8="blockwise"),
    "grouped_fp8_delayed": Case(**_MOE_ONE_LAYER, fp8="delayed"),
    "fp8_parameters_delayed": Case(sizes=_ONE_LAYER, fp8="delayed", fp8_parameters=True),
    "fp8_parameters_tensorwise": Case(sizes=_ONE_LAYER, fp8="tensorwise", fp8_parameters=True),
    "fp8_parameters_blockwise": Case(sizes=_BLOCKS, fp8="blockwise", fp8_parameters=True),
    "fp8_parameters_blockwise_cut": Case(sizes=_BLOCKS_CUT, fp8="blockwise", fp8_parameters=True),
    "grouped_fp8_parameters_blockwise": Case(**_MOE_BLOCKS, fp8="blockwise", fp8_parameters=True),
    "tp2": Case(sizes=_TWO_RANKS, tp=2),
    "tp2_nvfp4": Case(sizes=_TWO_RANKS, qat=True, tp=2),
    "tp2_fp8_delayed": Case(sizes=_TWO_RANKS, fp8="delayed", tp=2),
    "tp2_fp8_parameters_blockwise": Case(
        sizes={**_BLOCKS, "num_attention_heads": 2, "num_key_value_heads": 2},
        fp8="blockwise",
        fp8_parameters=True,
        tp=2,
    ),
    "tp2_latent_nvfp4": Case("DeepseekV3ForCausalLM", {**_LATENT, **_TWO_RANKS}, qat=True, tp=2),
    "ep2_grouped": Case(**_MOE_ONE_LAYER, ep=2),
    "ep2_grouped_nvfp4": Case(**_MOE_ONE_LAYER, qat=True, ep=2),
    "ep2_sequential_nvfp4": Case(**_MOE_ONE_LAYER, grouped=False, qat=True, ep=2),
    "ep2_grouped_fp8_delayed": Case(**_MOE_ONE_LAYER, fp8="delayed", ep=2),
}


def config_of(case: Case) -> Any:
    """transformers' configuration of the model; the import takes seconds."""
    import transformers

    kind: Callable[..., Any] = getattr(transformers, case.architecture).config_class
    return kind(architectures=[case.architecture], dtype="float32" if case.fp32 else "bfloat16", **case.fields)
