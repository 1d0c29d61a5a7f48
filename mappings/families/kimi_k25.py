"""Kimi-K2.5 and 2.6: Kimi-K2 inside a model that also sees images and videos, whose tower exports copy unchanged."""

from dataclasses import replace

from amaxbridge.mappings.families.deepseek_v3 import DEEPSEEK_V3

_PREFIX = "language_model."

KIMI_K25 = replace(
    DEEPSEEK_V3,
    architectures=("KimiK25ForConditionalGeneration",),
    mappings=tuple(
        mapping.rename(mapping.megatron_param, lambda name: _PREFIX + name) for mapping in DEEPSEEK_V3.mappings
    ),
    exceptions=lambda hf_config: (),
    requires={**DEEPSEEK_V3.requires, "num_nextn_predict_layers": 0},
    language_part="text_config",
    language_model=("DeepseekV3ForCausalLM", _PREFIX),
    carried=("vision_tower.", "mm_projector."),
)
"""As published. transformers' own class, `Kimi_K25…`, saves its layers under names that nothing else reads."""
