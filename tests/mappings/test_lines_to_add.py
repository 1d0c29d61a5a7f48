"""The lines that a message proposes for tensors without a mapping: right for what families of the field have."""

import pytest
import torch

from amaxbridge.mappings import weights
from amaxbridge.mappings.families import FAMILIES, family_of
from amaxbridge.mappings.family import ModelFamily
from amaxbridge.mappings.lines_to_add import lines_to_add
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.names import kind_of
from amaxbridge.mappings.registry import MappingRegistry
from amaxbridge.mappings.tensors import TensorSpec

NORM, LINEAR = TensorSpec((64,), torch.bfloat16), TensorSpec((64, 96), torch.bfloat16)
LAYER, HF = "decoder.layers.3", "model.layers.3"


def proposed(architecture: str, megatron: dict[str, TensorSpec | None], hf: dict[str, TensorSpec | None]) -> list[str]:
    text = lines_to_add(family_of({"architectures": [architecture]}).registry, megatron=megatron, hf=hf)
    first, *lines = text.splitlines()
    assert first.startswith("add these lines to the mappings of a family file of your own (family=FILE.py,")
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("megatron", "hf", "line"),
    [
        (
            {f"{LAYER}.self_attention.q_layernorm.weight": NORM},
            {},
            'ReplicatedMapping("decoder.layers.*.self_attention.q_layernorm.weight", '
            '"model.layers.*.self_attn.q_layernorm.weight"),',
        ),
        (
            {f"{LAYER}.self_attention.q_layernorm.weight": NORM},
            {f"{HF}.self_attn.q_norm.weight": NORM},
            'ReplicatedMapping("decoder.layers.*.self_attention.q_layernorm.weight", '
            '"model.layers.*.self_attn.q_norm.weight"),',
        ),
        (
            {f"{LAYER}.self_attention.linear_qkv.bias": NORM},
            {},
            'QKVMapping("decoder.layers.*.self_attention.linear_qkv.bias", q="model.layers.*.self_attn.q_proj.bias", '
            'k="model.layers.*.self_attn.k_proj.bias", v="model.layers.*.self_attn.v_proj.bias"),',
        ),
        (
            {f"{LAYER}.mlp.linear_fc2.bias": NORM},
            {},
            'ReplicatedMapping("decoder.layers.*.mlp.linear_fc2.bias", "model.layers.*.mlp.down_proj.bias"),',
        ),
        (
            {f"{LAYER}.mlp.shared_experts.linear_fc1.weight": LINEAR},
            {},
            'GatedMLPMapping("decoder.layers.*.mlp.shared_experts.linear_fc1.weight", '
            'gate="model.layers.*.mlp.shared_experts.gate_proj.weight", '
            'up="model.layers.*.mlp.shared_experts.up_proj.weight"),',
        ),
        (
            {f"{LAYER}.mlp.shared_experts.linear_fc2.weight": LINEAR},
            {},
            'RowParallelMapping("decoder.layers.*.mlp.shared_experts.linear_fc2.weight", '
            '"model.layers.*.mlp.shared_experts.linear_fc2.weight"),',
        ),
        (
            {f"{LAYER}.self_attention.gate.weight": LINEAR},
            {},
            'ReplicatedMapping("decoder.layers.*.self_attention.gate.weight", "model.layers.*.self_attn.gate.weight"),'
            "  # ColumnParallelMapping if ranks hold its rows, RowParallelMapping if its columns",
        ),
        (
            {},
            {f"{HF}.self_attn.q_norm.weight": NORM},
            'ReplicatedMapping("decoder.layers.*.self_attention.q_norm.weight", '
            '"model.layers.*.self_attn.q_norm.weight"),',
        ),
        (
            {},
            {f"{HF}.mlp.shared_expert.{each}_proj.weight": LINEAR for each in ("gate", "up")},
            'GatedMLPMapping("decoder.layers.*.mlp.shared_expert.linear_fc1.weight", '
            'gate="model.layers.*.mlp.shared_expert.gate_proj.weight", '
            'up="model.layers.*.mlp.shared_expert.up_proj.weight"),',
        ),
        ({"encoder.odd": None}, {}, 'ReplicatedMapping("encoder.odd", "encoder.odd"),'),
    ],
)
def test_a_line(megatron: dict[str, TensorSpec | None], hf: dict[str, TensorSpec | None], line: str) -> None:
    assert proposed("LlamaForCausalLM", megatron, hf) == [line]


def test_many_layers_are_one_line_and_what_has_a_mapping_is_left_out() -> None:
    names = {f"decoder.layers.{n}.{part}.weight": NORM for n in range(9) for part in ("extra_norm", "input_layernorm")}
    assert len(proposed("LlamaForCausalLM", names, {})) == 1
    assert len(proposed("LlamaForCausalLM", {f"decoder.layers.0.norm_{c}.weight": NORM for c in "abc" * 9}, {})) == 3


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architectures[0])
def test_a_family_that_lacks_one_of_its_mappings_gets_it_back(family: ModelFamily) -> None:
    """Of each mapping of each family, from its names on both sides: the line runs, and has the same names."""
    exact, with_numbers = 0, [each for each in family.mappings if kind_of(each.megatron_param) != each.megatron_param]
    assert len(with_numbers) < len(family.mappings) / 4, "a line would have wildcards in place of their numbers"
    for missing in family.mappings:
        if missing in with_numbers:
            continue
        rest = [mapping for mapping in family.mappings if mapping is not missing]
        names = {missing.megatron_param.replace("*", "1"): None}
        targets = {target.replace("*", "1"): None for target in missing.targets}
        text = lines_to_add(MappingRegistry(*rest), megatron=dict(names), hf=dict(targets))
        made = list(map(evaluated, text.splitlines()[1:]))
        assert made and all(mapping.megatron_param for mapping in made)
        assert missing.megatron_param in {mapping.megatron_param for mapping in made}
        assert set(missing.targets) <= {target for mapping in made for target in mapping.targets}
        exact += len(made) == 1 and made[0].targets == missing.targets
    assert exact >= (len(family.mappings) - len(with_numbers)) * 0.8


def evaluated(line: str) -> MegatronParamMapping:
    """The mapping that a line makes where a family file has it."""
    classes = {type(mapping).__name__: type(mapping) for family in FAMILIES for mapping in family.mappings}
    made = eval(f"[{line.strip()}\n]", {**vars(weights), **classes})
    assert len(made) == 1 and isinstance(made[0], MegatronParamMapping)
    return made[0]
