"""All quantizer state of a model in Hugging Face names, derived from its weight mappings.

linear_fc1.weight_quantizer._amax                  gate_proj.weight_quantizer._amax, up_proj.…
linear_fc1.weight_quantizer._amax_post, ._amax_pre the same, learned (LSQ)
linear_fc1.input_quantizer._amax                   the same for the input
linear_fc1.input_quantizer._pre_quant_scale        multiplies the input first (AWQ, SmoothQuant)
linear_fc1.output_quantizer._amax                  the same for the output
core_attention.k_bmm_quantizer._amax               self_attn.k_bmm_quantizer._amax, the key-value cache
experts.linear_fc1.weight_quantizer._amax          each local expert, one shared quantizer
experts.linear_fc1.weight_quantizer.3._amax        one expert
linear_fc1.weight_quantizer.stored_scales          gate_proj.weight_quantizer.stored_scales, up_proj.… (FP8 parameters)
"""

from collections.abc import Iterable, Iterator, Sequence

from amaxbridge.mappings.amax import (
    INPUT_QUANTIZER,
    LEARNED_POST,
    LEARNED_PRE,
    OUTPUT_QUANTIZER,
    PRE_QUANT_SCALE,
    WEIGHT_QUANTIZER,
    CacheAmaxMapping,
    convert_to_amax_map,
    per_expert_amax_map,
    stored_scales_map,
)
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.names import module_of
from amaxbridge.mappings.weights import QKVMapping

_SUFFIXES = (WEIGHT_QUANTIZER, LEARNED_POST, LEARNED_PRE, INPUT_QUANTIZER, PRE_QUANT_SCALE, OUTPUT_QUANTIZER)


def quantizer_mappings(weights: Sequence[MegatronParamMapping]) -> Iterator[MegatronParamMapping]:
    """The mappings of every quantizer buffer that ModelOpt may put beside these weights; experts share one."""
    for suffix in _SUFFIXES:
        yield from convert_to_amax_map(weights, suffix)
    yield from stored_scales_map(weights)
    yield from _key_value_cache(weights)


def per_expert_quantizer_mappings(weights: Sequence[MegatronParamMapping]) -> Iterator[MegatronParamMapping]:
    """The alternative to shared quantizers: one quantizer for each expert, with the same HF names."""
    for suffix in _SUFFIXES:
        yield from per_expert_amax_map(weights, suffix)


def _key_value_cache(weights: Iterable[MegatronParamMapping]) -> Iterator[MegatronParamMapping]:
    """The quantizers of keys and values inside `core_attention`, for each fused QKV."""
    fused = ".linear_qkv.weight"
    for mapping in weights:
        if isinstance(mapping, QKVMapping) and mapping.megatron_param.endswith(fused):
            core = mapping.megatron_param.removesuffix(fused) + ".core_attention"
            attention = module_of(module_of(mapping.k))
            for quantizer in ("k_bmm_quantizer._amax", "v_bmm_quantizer._amax"):
                yield CacheAmaxMapping(f"{core}.{quantizer}", f"{attention}.{quantizer}")
