"""GLM-4.7-Flash: DeepSeek-V3's layers and router, with a list that says which layers are dense."""

from dataclasses import replace

from amaxbridge.mappings.families import sigmoid_experts
from amaxbridge.mappings.families.deepseek_v3 import DEEPSEEK_V3

GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    architectures=("Glm4MoeLiteForCausalLM",),
    transformer={**DEEPSEEK_V3.transformer, "moe_layer_freq": sigmoid_experts.LISTED_LAYERS},
    alike=DEEPSEEK_V3.architectures,
)
