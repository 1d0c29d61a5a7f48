"""Which norm or linear makes the inputs of which linear, by family."""

from collections.abc import Mapping

import pytest

from amaxbridge.bridge.plan.input_multipliers import linears_before, module_before, norms_with_linears
from amaxbridge.mappings.families.deepseek_v3 import DEEPSEEK_V3
from amaxbridge.mappings.families.gemma import GEMMA2, GEMMA3
from amaxbridge.mappings.families.gpt_oss import GPT_OSS
from amaxbridge.mappings.families.nemotron_h import NEMOTRON_H
from amaxbridge.mappings.families.qwen2 import QWEN2
from amaxbridge.mappings.families.qwen2_moe import QWEN2_MOE
from amaxbridge.mappings.families.qwen3_moe import QWEN3_MOE
from amaxbridge.mappings.family import ModelFamily
from amaxbridge.mappings.mapping import MegatronParamMapping

LAYER = "model.layers.3"
ATTENTION = {f"{LAYER}.self_attn.o_proj": f"{LAYER}.self_attn.v_proj"}
DENSE = {f"{LAYER}.mlp.down_proj": f"{LAYER}.mlp.up_proj"}
EXPERTS = {f"{LAYER}.mlp.experts.1.down_proj": f"{LAYER}.mlp.experts.1.up_proj"}
PLACES: Mapping[str, tuple[ModelFamily, dict[str, str], int]] = {
    "dense": (QWEN2, ATTENTION | DENSE, 2),
    "experts": (QWEN3_MOE, ATTENTION | DENSE | EXPERTS, 2),
    "shared expert": (
        QWEN2_MOE,
        ATTENTION | DENSE | EXPERTS | {f"{LAYER}.mlp.shared_expert.down_proj": f"{LAYER}.mlp.shared_expert.up_proj"},
        2,
    ),
    "latent attention": (
        DEEPSEEK_V3,
        DENSE | EXPERTS | {f"{LAYER}.mlp.shared_experts.down_proj": f"{LAYER}.mlp.shared_experts.up_proj"},
        1,
    ),
    "query and key norms": (GEMMA3, ATTENTION | DENSE, 2),
    "norms before and after": (GEMMA2, ATTENTION | DENSE, 2),
    "Mamba, and MLPs without a gate": (
        NEMOTRON_H,
        {f"{layers}.3.mixer.o_proj": f"{layers}.3.mixer.v_proj" for layers in ("backbone.layers", "mtp.layers")},
        0,
    ),
}
"""The modules whose vectors rows may take, with the module that has these rows, and the number of norms."""


def of_one_layer(family: ModelFamily) -> dict[str, MegatronParamMapping]:
    """The resolved mappings of layer 3, expert 1, by Megatron name; every quantizer among them."""
    names = [each.megatron_param.replace("layers.*", "layers.3").replace("*", "1") for each in family.registry]
    found = {name: mapping for name in names if (mapping := family.registry.megatron_to_hf_lookup(name)) is not None}
    assert len(found) > 30
    return found


@pytest.mark.parametrize("kind", PLACES)
def test_places(kind: str) -> None:
    family, rows, norms = PLACES[kind]
    mappings = of_one_layer(family)
    found = {
        mappings[vector].targets[0].partition(".input_quantizer")[0]: module_before(mappings[weight])
        for vector, weight in linears_before(mappings).items()
        if ".experts." not in vector or ".input_quantizer.1." in vector
    }
    assert found == rows
    assert len(norms_with_linears(mappings)) == norms
    assert family.up_is_a_factor


def test_clamped_and_shifted_activations_are_no_factors() -> None:
    assert not GPT_OSS.up_is_a_factor
    assert len(linears_before(of_one_layer(GPT_OSS))) > 1
