"""What is known about architectures decides; what is not known is refused."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amaxbridge.export.architectures.facts import KNOWN, Role, architecture_of, value_of
from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.mappings.errors import MappingError, UsageError
from amaxbridge.mappings.families import FAMILIES
from amaxbridge.mappings.family import PackedExperts
from tests.support.checkpoints import DENSE, dense_model, moe_model, write_checkpoint

HIDDEN, FFN, EXPERTS = 64, 48, 3
GRANITE = {
    "architectures": ["GraniteMoeForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_local_experts": EXPERTS,
}
QWEN3_VL = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "text_config": {"hidden_size": HIDDEN, "moe_intermediate_size": FFN, "num_experts": EXPERTS},
}
LLAMA4 = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "text_config": {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_local_experts": EXPERTS},
}


def random(*shape: int) -> Tensor:
    """A random weight that depends on its shape alone."""
    generator = torch.Generator().manual_seed(sum(index * size for index, size in enumerate(shape, start=1)))
    return torch.randn(*shape, generator=generator).bfloat16()


def dequantized(directory: Path, module: str) -> Tensor:
    """A weight of an FP8 output, with a scale for each row."""
    from tests.support.checkpoints import tensors_in

    tensors = tensors_in(directory)
    return tensors[f"{module}.weight"].float() * tensors[f"{module}.weight_scale"].float()


def quantize(tensors: Mapping[str, Tensor], config: Mapping[str, Any], tmp_path: Path, **options: Any) -> Path:
    """The output of `fp8_dynamic`."""
    source = write_checkpoint(tmp_path / "source", tensors, config=config)
    model_free_ptq(source, tmp_path / "out", "fp8_dynamic", device="cpu", verify=False, **options)
    return tmp_path / "out"


def ignored(directory: Path) -> list[str]:
    """The `ignore` list of an output."""
    found: list[str] = json.loads((directory / "config.json").read_text())["quantization_config"]["ignore"]
    return found


def test_every_file_of_the_table_is_sound() -> None:
    files = sorted(KNOWN.glob("*.json"))
    assert len(files) > 300
    for file in files:
        name, _, model_type = file.stem.partition(".")
        known = architecture_of({"architectures": [name], "model_type": model_type})
        assert known is not None and known.facts, file.stem
        weights = (Role.LINEAR, Role.EXPERTS, Role.INPUTS_FIRST, Role.RECURRENT)
        assert any(fact.role in weights for fact in known.facts.values()), file
        for pattern, fact in known.facts.items():
            assert all(each is None or value_of(each, {}) is None for each in fact.shape or ()), (file.stem, pattern)


def test_every_family_is_of_a_known_architecture() -> None:
    names = [name for family in FAMILIES for name in family.architectures]
    assert len(names) >= 15
    assert not [name for name in names if architecture_of({"architectures": [name]}) is None]


def test_families_and_the_table_pack_experts_alike() -> None:
    """Families state their layout for writing: the table is for reading, by patterns of names."""
    seen, names = 0, PackedExperts().names
    for family in FAMILIES:
        for name in family.architectures:
            known = architecture_of({"architectures": [name]})
            assert known is not None
            packed = [
                pattern
                for pattern, fact in known.facts.items()
                if fact.role is Role.EXPERTS and fact.inputs_first is not None and not pattern.endswith("bias")
            ]
            stated = replace(family.packed_experts or PackedExperts(), names=names)
            assert {known.layout_of(pattern) for pattern in packed} <= {stated}, name
            seen += bool(packed)
    assert seen >= 7


class TestPackedExperts:
    """Each expert's projection is cut along the side that the architecture says, in every published order of axes."""

    def check(self, out: Path, module: str, gate_up: Tensor, down: Tensor) -> None:
        """Args: weights of one expert with outputs first."""
        for name, expected in (("gate_proj", gate_up[:FFN]), ("up_proj", gate_up[FFN:]), ("down_proj", down)):
            found = dequantized(out, f"{module}.1.{name}")
            assert found.shape == expected.shape
            assert (found - expected.float()).norm() < 0.05 * expected.float().norm()

    def test_three_dims_under_another_name(self, tmp_path: Path) -> None:
        layer = "model.layers.0.block_sparse_moe"
        gate_up, down = random(EXPERTS, 2 * FFN, HIDDEN), random(EXPERTS, HIDDEN, FFN)
        tensors = {
            f"{layer}.input_linear.weight": gate_up,
            f"{layer}.output_linear.weight": down,
            f"{layer}.router.layer.weight": random(EXPERTS, HIDDEN),
        }
        out = quantize(tensors, GRANITE, tmp_path)
        self.check(out, f"{layer}.experts", gate_up[1], down[1])
        assert f"{layer}.router.layer" in ignored(out)

    @pytest.mark.parametrize("inputs_first", [False, True])
    @pytest.mark.parametrize("square", [False, True])
    def test_either_order_of_axes(self, inputs_first: bool, square: bool, tmp_path: Path) -> None:
        ffn = HIDDEN // 2 if square else FFN
        config = {**QWEN3_VL, "text_config": {**QWEN3_VL["text_config"], "moe_intermediate_size": ffn}}
        layer = "model.language_model.layers.0.mlp.experts"
        gate_up, down = random(EXPERTS, 2 * ffn, HIDDEN), random(EXPERTS, HIDDEN, ffn)
        stored = {f"{layer}.gate_up_proj": gate_up, f"{layer}.down_proj": down}
        if inputs_first:
            stored = {name: tensor.transpose(1, 2) for name, tensor in stored.items()}
        out = quantize(stored, config, tmp_path)
        for name, expected in (("gate_proj", gate_up[1, :ffn]), ("up_proj", gate_up[1, ffn:]), ("down_proj", down[1])):
            found = dequantized(out, f"{layer}.1.{name}")
            assert found.shape == expected.shape
            assert (found - expected.float()).norm() < 0.05 * expected.float().norm()

    def test_inputs_first_always(self, tmp_path: Path) -> None:
        layer = "language_model.model.layers.0.feed_forward.experts"
        gate_up, down = random(EXPERTS, HIDDEN, 2 * FFN), random(EXPERTS, FFN, HIDDEN)
        out = quantize({f"{layer}.gate_up_proj": gate_up, f"{layer}.down_proj": down}, LLAMA4, tmp_path)
        self.check(out, layer, gate_up[1].t(), down[1].t())

    def test_experts_that_stay_packed_are_in_ignore(self, tmp_path: Path) -> None:
        tensors = moe_model(1, packed=True)
        out = quantize(
            tensors, {"architectures": ["Qwen3MoeForCausalLM"]}, tmp_path, ignore=[r"re:.*\.experts(\..*)?$"]
        )
        assert "model.layers.0.mlp.experts" in ignored(out)


class TestNames:
    """`ignore` has the names of files and those that transformers gives the same modules."""

    def test_towers(self, tmp_path: Path) -> None:
        tensors = {
            "language_model.model.layers.0.self_attn.q_proj.weight": random(HIDDEN, HIDDEN),
            "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": random(HIDDEN, HIDDEN),
            "multi_modal_projector.linear_1.weight": random(HIDDEN, HIDDEN),
        }
        found = ignored(quantize(tensors, {"architectures": ["LlavaForConditionalGeneration"]}, tmp_path))
        assert {r"re:model\.vision_tower(\.|$)", r"re:model\.multi_modal_projector(\.|$)", "lm_head"} <= set(found)

    def test_a_router_that_was_renamed(self, tmp_path: Path) -> None:
        layer = "model.layers.0.block_sparse_moe"
        tensors = {f"{layer}.gate.weight": random(4, HIDDEN), f"{layer}.experts.0.w2.weight": random(HIDDEN, 32)}
        found = ignored(quantize(tensors, {"architectures": ["PhimoeForCausalLM"]}, tmp_path))
        assert {f"{layer}.gate", "model.layers.0.mlp.router", "lm_head"} <= set(found)

    def test_a_head_of_another_name(self, tmp_path: Path) -> None:
        tensors = {
            "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": random(4 * HIDDEN, HIDDEN),
            "embed_out.weight": random(100, HIDDEN),
        }
        found = ignored(quantize(tensors, {"architectures": ["GPTNeoXForCausalLM"]}, tmp_path))
        assert {"embed_out", "lm_head"} <= set(found)


class TestRefusals:
    """What is not known is refused by name, before a byte is written."""

    def refused(self, tmp_path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], message: str) -> None:
        with pytest.raises((MappingError, UsageError), match=message):
            quantize(tensors, config, tmp_path)
        assert not list(tmp_path.glob("out*"))

    def test_an_unknown_architecture_says_what_it_would_be_taken_for(self, tmp_path: Path) -> None:
        message = r"(?s)Qwen9ForCausalLM, which is not known.*would be quantized:.*down_proj.*architecture=guess"
        self.refused(tmp_path, dense_model(1), {"architectures": ["Qwen9ForCausalLM"]}, message)

    def test_a_guess_that_is_accepted_is_said(self, tmp_path: Path) -> None:
        out = quantize(dense_model(1), {"architectures": ["Qwen9ForCausalLM"]}, tmp_path, architecture="guess")
        assert json.loads((out / "amaxbridge.json").read_text())["architecture"] == "guess"
        assert "was guessed by their names" in (out / "README.md").read_text()

    def test_a_known_architecture_by_name(self, tmp_path: Path) -> None:
        guessed = {**DENSE, "architectures": ["MyQwen3"], "auto_map": {}}
        out = quantize(dense_model(1), guessed, tmp_path, architecture="Qwen3ForCausalLM")
        assert "architecture" not in json.loads((out / "amaxbridge.json").read_text())
        with pytest.raises(UsageError, match=r"architecture=Qwen3 is not known \(near it: Qwen3ForCausalLM"):
            quantize(dense_model(1), guessed, tmp_path / "b", architecture="Qwen3")

    def test_a_tensor_that_the_architecture_does_not_have(self, tmp_path: Path) -> None:
        extra = {"model.layers.0.mlp.side_proj.weight": random(HIDDEN, HIDDEN)}
        self.refused(
            tmp_path, {**dense_model(1), **extra}, DENSE, r"(?s)1 tensors are not known of Qwen3ForCausalLM:.*side_proj"
        )

    def test_it_can_be_ignored(self, tmp_path: Path) -> None:
        extra = {"model.layers.0.mlp.side_proj.weight": random(HIDDEN, HIDDEN)}
        out = quantize({**dense_model(1), **extra}, DENSE, tmp_path, ignore=["model.layers.0.mlp.side_proj"])
        assert "model.layers.0.mlp.side_proj" in ignored(out)

    def test_a_shape_that_config_json_denies(self, tmp_path: Path) -> None:
        message = r"(?s)do not fit config.json:.*q_proj.*hidden_size = 512"
        self.refused(tmp_path, dense_model(1), {**DENSE, "hidden_size": 512}, message)

    def test_experts_that_fit_in_no_order(self, tmp_path: Path) -> None:
        layer = "model.language_model.layers.0.mlp.experts"
        tensors = {
            f"{layer}.gate_up_proj": random(EXPERTS, 100, HIDDEN),
            f"{layer}.down_proj": random(EXPERTS, HIDDEN, 50),
        }
        self.refused(
            tmp_path, tensors, QWEN3_VL, "(?s)sizes in config.json do not tell which it is here:.*gate_up_proj"
        )

    def test_linears_with_inputs_first(self, tmp_path: Path) -> None:
        tensors = {"h.0.attn.c_attn.weight": random(HIDDEN, 3 * HIDDEN)}
        self.refused(
            tmp_path, tensors, {"architectures": ["GPT2LMHeadModel"]}, r"c_attn.weight: a weight stored as \[in, out\]"
        )

    def test_experts_that_are_not_taken_apart(self, tmp_path: Path) -> None:
        tensors = {"model.layers.0.mlp.input_linear.weight": random(EXPERTS, 2 * FFN, HIDDEN)}
        self.refused(
            tmp_path, tensors, {"architectures": ["JetMoeForCausalLM"]}, "experts in a layout that is not taken apart"
        )


def test_what_engines_build_unquantized_stays(tmp_path: Path) -> None:
    layer = "model.layers.0.self_attn"
    tensors = {
        f"{layer}.q_a_proj.weight": random(HIDDEN, HIDDEN),
        f"{layer}.kv_a_proj_with_mqa.weight": random(HIDDEN, HIDDEN),
        f"{layer}.indexer.weights_proj.weight": random(4, HIDDEN),
        f"{layer}.indexer.wk.weight": random(32, HIDDEN),
    }
    found = ignored(quantize(tensors, {"architectures": ["GlmMoeDsaForCausalLM"]}, tmp_path))
    assert {f"{layer}.indexer.weights_proj", f"{layer}.indexer.wk"} <= set(found)


def test_layers_behind_the_last_and_old_buffers_are_known() -> None:
    known = architecture_of({"architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 2})
    assert known is not None
    roles = {
        "model.layers.2.eh_proj.weight": Role.MTP,
        "model.layers.1.eh_proj.weight": None,
        "model.layers.2.mlp.experts.7.up_proj.weight": Role.LINEAR,
        "model.layers.0.self_attn.rotary_emb.inv_freq": Role.BUFFER,
        "model.layers.0.self_attn.q_a_proj.bias": Role.VECTOR,
    }
    for name, role in roles.items():
        fact = known.fact(name)
        assert (None if fact is None else fact.role) == role, name
