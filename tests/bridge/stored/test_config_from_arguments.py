"""config.json made of the arguments that Megatron saves: every family, and arguments of Megatron's own command line."""

import argparse
import contextlib
import dataclasses
import io
from argparse import Namespace
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from amaxbridge.bridge.hf import HFModel, make_hf_model
from amaxbridge.bridge.stored.config_from_arguments import _attempt, model_of_arguments
from amaxbridge.mappings.errors import CheckpointError, UnknownArchitectureError, UsageError
from amaxbridge.mappings.families import family_of
from amaxbridge.mappings.megatron_settings import DEFAULTS, differences, from_arguments, to_arguments
from tests.support.published_models import NOT_BUILT, PARAMETERS, published, with_images
from tests.support.tiny_models import TINY_MODELS

NOT_OF_MEGATRON = {"initializer_range", "chunk_size", "bos_token_id", "eos_token_id", "pad_token_id"}
NOT_OF_THIS_MEGATRON = {
    *("activation", "post_self_attn_layernorm", "post_mlp_layernorm", "qk_layernorm_after_rotary"),
    "attn_temperature_tuning",
}
TWO_KINDS = (  # which the arguments do not tell apart; `test_parity.py` has their tensors
    *("Qwen3-MoE", "OLMoE"),
    *("Exaone 4 without windows", "OLMo 2", "MiniMax-M2"),
)
ALIKE = {  # which compute the same as a family before them
    "Seed-OSS": "Qwen2ForCausalLM",
    "Ministral 3": "MistralForCausalLM",
    "Phi-3": "LlamaForCausalLM",
    "Hunyuan 3": "Glm4MoeForCausalLM",
    "GLM-4.7-Flash": "DeepseekV3ForCausalLM",
}
TWO_FORMS = {"Qwen3.5-MoE", "Qwen3-Coder-Next-E336"}  # Qwen3-Next and Qwen3.5 are one model in Megatron
IMAGES = {*(name for name in TINY_MODELS if "images" in name), *with_images()}  # of which Megatron has a part
STRETCHED = "Hunyuan, dense, stretched"  # whose rotary base comes back, but not what it was stretched by
UNBUILDABLE = {name for name, tiny in TINY_MODELS.items() if tiny.unbuildable}  # so that nothing saves their arguments
OTHERS = {*TWO_KINDS, *ALIKE, *TWO_FORMS, *IMAGES, *UNBUILDABLE, STRETCHED}
ONE_KIND = sorted({name.partition(", Hybrid")[0] for name in TINY_MODELS} - OTHERS)


def arguments_of(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    return to_arguments(family_of(hf_config).settings(hf_config))


def there_and_back(hf_config: Mapping[str, Any]) -> HFModel:
    family = family_of(hf_config)
    settings = family.settings_of(from_arguments(arguments_of(hf_config)))
    return make_hf_model(family, family.hf_config({**DEFAULTS, **settings}), torch.bfloat16)


def save_with(directory: Path, arguments: Mapping[str, Any], rows: int = 131) -> Path:
    """Saves a checkpoint that holds an embedding and arguments."""
    state = {"embedding.word_embeddings.weight": torch.ones(rows, 64, dtype=torch.bfloat16)}
    save(state, storage_writer=FileSystemWriter(directory), no_dist=True)
    torch.save({"args": Namespace(**arguments)}, directory / "common.pt")
    return directory


@pytest.mark.parametrize("name", [*ONE_KIND, *TWO_KINDS, *ALIKE, "Qwen3.5-MoE"])
def test_a_tiny_config_comes_back(name: str) -> None:
    """Every field comes back, except those that no setting of Megatron decides."""
    original = TINY_MODELS[name].make().to_dict()
    made = there_and_back(original).config
    for field in original.keys() - NOT_OF_MEGATRON:
        value, found = original[field], made.get(field)
        if isinstance(value, dict):
            assert value.items() <= found.items(), field  # YaRN says its defaults
        elif value is not None:  # a head_dim that was left out
            assert found == value, field


@pytest.mark.parametrize("name", sorted(PARAMETERS.keys() - {*IMAGES, *NOT_BUILT}))
def test_a_published_config_computes_the_same(name: str) -> None:
    original = published(name).to_dict()
    family = family_of(original)
    made = there_and_back(original)
    assert differences(family.settings(made.config), family.settings(original)) == []
    assert made.written["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ONE_KIND)
def test_the_arguments_tell_the_family(name: str, tmp_path: Path) -> None:
    original = TINY_MODELS[name].make().to_dict()
    hf = model_of_arguments(save_with(tmp_path, arguments_of(original)))
    assert hf.written["architectures"] == original["architectures"]
    assert hf.written["vocab_size"] == 131
    assert not [note for note in hf.notes if "Megatron's defaults" in note]


@pytest.mark.parametrize(("name", "first"), ALIKE.items())
def test_of_families_that_compute_the_same_the_first_is_taken(name: str, first: str, tmp_path: Path) -> None:
    """The other one has to be named."""
    original = TINY_MODELS[name].make().to_dict()
    checkpoint = save_with(tmp_path, arguments_of(original))
    assert model_of_arguments(checkpoint).written["architectures"] == [first]
    (wanted,) = original["architectures"]
    assert model_of_arguments(checkpoint, architecture=wanted).written["architectures"] == [wanted]


def test_a_model_that_hugging_face_has_in_two_forms_must_be_named(tmp_path: Path) -> None:
    """Qwen3.5 has the projections of a gated delta net apart, Qwen3-Next together; Megatron has them all in one."""
    checkpoint = save_with(tmp_path, arguments_of(TINY_MODELS["Qwen3.5-MoE"].make().to_dict()))
    names = ("Qwen3NextForCausalLM", "Qwen3_5MoeForCausalLM")
    with pytest.raises(UsageError, match=f"fit {', '.join(names)}: choose one with architecture="):
        model_of_arguments(checkpoint)
    for name in names:
        assert model_of_arguments(checkpoint, architecture=name).written["architectures"] == [name]


COMMON = (
    "--seq-length 32 --micro-batch-size 1 --bf16 --normalization RMSNorm --disable-bias-linear "
    "--transformer-impl local --untie-embeddings-and-output-weights "
    "--no-masked-softmax-fusion --no-rope-fusion --vocab-size 128256"
)
LLAMA = f"{COMMON} --swiglu --position-embedding-type rope --hidden-size 4096 --num-attention-heads 32"
GQA = "--ffn-hidden-size 14336 --group-query-attention --num-query-groups 8 --num-layers 32"
COMMAND_LINES = {
    "Llama-3.1-8B": f"{LLAMA} {GQA} --max-position-embeddings 131072 --rotary-base 500000 --use-rope-scaling",
    "Mixtral-8x7B": (
        f"{LLAMA} {GQA} --max-position-embeddings 32768 --rotary-base 1000000 --num-experts 8 --moe-router-topk 2"
    ),
    "DeepSeek-V3": (
        f"{COMMON} --swiglu --position-embedding-type rope --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 "
        "--num-attention-heads 128 --kv-channels 128 --max-position-embeddings 163840 --multi-latent-attention "
        "--q-lora-rank 1536 --kv-lora-rank 512 --qk-layernorm --norm-epsilon 1e-6 --rotary-scaling-factor 40 "
        "--mscale 1.0 --mscale-all-dim 1.0 --num-experts 256 --moe-layer-freq ([0]*3+[1]*58) "
        "--moe-ffn-hidden-size 2048 --moe-shared-expert-intermediate-size 2048 --moe-router-topk 8 "
        "--moe-router-num-groups 8 --moe-router-group-topk 4 --moe-router-topk-scaling-factor 2.5 "
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --mtp-num-layers 1"
    ),
    "GPT-OSS-20B": (
        "--seq-length 32 --micro-batch-size 1 --bf16 --normalization RMSNorm --untie-embeddings-and-output-weights "
        "--no-masked-softmax-fusion --transformer-impl local --vocab-size 201088 --quick-geglu --num-layers 24 "
        "--hidden-size 2880 --ffn-hidden-size 2880 --num-attention-heads 64 --kv-channels 64 --add-qkv-bias "
        "--group-query-attention --num-query-groups 8 --max-position-embeddings 131072 --rotary-base 150000 "
        "--position-embedding-type yarn --rotary-scaling-factor 32 --yarn-original-max-position-embeddings 4096 "
        "--no-yarn-correction-range-round-to-int --softmax-type learnable --window-size 127,0 "
        "--window-attn-skip-freq 2 --activation-func-clamp-value 7.0 --glu-linear-offset 1.0 --num-experts 32 "
        "--moe-router-topk 4"
    ),
    "Qwen3-Coder-Next-E336": (
        f"{COMMON} --swiglu --position-embedding-type rope --num-layers 48 --hidden-size 2048 --ffn-hidden-size 5120 "
        "--num-attention-heads 16 --kv-channels 256 --group-query-attention --num-query-groups 2 --qk-layernorm "
        "--apply-layernorm-1p --norm-epsilon 1e-6 --attention-output-gate --rotary-percent 0.25 --rotary-base 5000000 "
        "--max-position-embeddings 262144 --experimental-attention-variant gated_delta_net --linear-attention-freq 4 "
        "--linear-num-key-heads 16 --linear-num-value-heads 32 --num-experts 336 --moe-ffn-hidden-size 512 "
        "--moe-shared-expert-intermediate-size 512 --moe-shared-expert-gate --moe-router-topk 10"
    ),
    "Nemotron-3-Super-120B-A12B": (
        f"{COMMON.replace('128256', '131072')} --squared-relu --position-embedding-type none --hidden-size 4096 "
        "--num-attention-heads 32 --ffn-hidden-size 2688 --kv-channels 128 --group-query-attention "
        "--num-query-groups 2 --mamba-num-heads 128 --max-position-embeddings 262144 --num-experts 512 "
        "--moe-ffn-hidden-size 2688 --moe-shared-expert-intermediate-size 5376 --moe-latent-size 1024 "
        "--moe-router-topk 22 --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
        "--moe-router-topk-scaling-factor 5.0 --mtp-use-repeated-layer --mtp-num-layers 2 "
        "--hybrid-layer-pattern MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*"
        "EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME/*E/*E"
    ),
    "Nemotron-H-8B": (
        f"{COMMON} --squared-relu --position-embedding-type none --hidden-size 4096 --num-attention-heads 32 "
        "--ffn-hidden-size 21504 --kv-channels 128 --group-query-attention --num-query-groups 8 --mamba-num-heads 128 "
        "--max-position-embeddings 8192 --hybrid-layer-pattern M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
    ),
}


@pytest.fixture(scope="module")
def megatron_arguments() -> dict[str, Namespace]:
    """The arguments that Megatron's training makes of command lines, and saves."""
    from megatron.training.arguments import add_megatron_arguments, validate_args

    made = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for name, line in COMMAND_LINES.items():
            arguments = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args(line.split())
            arguments.rank, arguments.world_size = 0, 1
            arguments._is_global_batch_size_explicitly_specified = False
            validate_args(arguments)
            made[name] = arguments
    return made


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_arguments_of_megatron_s_command_line(
    name: str, megatron_arguments: dict[str, Namespace], tmp_path: Path
) -> None:
    """The family, its published sizes, and the configuration that Megatron itself makes of the arguments."""
    from megatron.training.arguments import core_transformer_config_from_args

    arguments, original = megatron_arguments[name], published(name).to_dict()
    checkpoint, family = save_with(tmp_path, vars(arguments)), family_of(original)
    hf = model_of_arguments(checkpoint, architecture=family.architectures[0] if name in TWO_FORMS else None)
    assert hf.family is family
    expected = {**family.settings(original), "vocab_size": arguments.vocab_size}
    assert differences(family.settings(hf.config), expected) == []
    fields = (family.hybrid_config if family.hybrid_pattern else family.transformer_config)(hf.config)
    made_by_megatron = {**vars(arguments), **vars(core_transformer_config_from_args(arguments))}
    assert differences(family.settings_of(from_arguments(made_by_megatron)), {**expected, **fields}) == []


def test_defaults_are_megatron_s() -> None:
    """A default is that of Megatron's command line or, where that has no such option, of its configuration."""
    from megatron.core.transformer import MLATransformerConfig
    from megatron.training.arguments import add_megatron_arguments

    line = from_arguments(vars(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args([])))
    fields = {field.name: field.default for field in dataclasses.fields(MLATransformerConfig)}
    fields |= {"multi_latent_attention": False, "normalization": "LayerNorm", "q_lora_rank": None}
    known = {name: line.get(name, fields.get(name)) for name in DEFAULTS if name in line or name in fields}
    assert {name: DEFAULTS[name] for name in known} == known
    others = {name for name, value in DEFAULTS.items() if value is not None and name not in known}
    assert [name for name in others - NOT_OF_THIS_MEGATRON if not name.startswith("yarn_")] == []  # GPT-OSS above


class TestOptionsAndErrors:
    @pytest.fixture
    def arguments(self) -> dict[str, Any]:
        return arguments_of(TINY_MODELS["Llama 2"].make().to_dict())

    def test_a_padded_vocabulary(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        del arguments["vocab_size"]
        checkpoint = save_with(tmp_path, arguments, rows=256)
        hf = model_of_arguments(checkpoint)
        assert hf.written["vocab_size"] == 256
        assert "vocab_size is 256, which Megatron padded" in "\n".join(hf.notes)
        hf = model_of_arguments(checkpoint, vocab_size=131)
        assert hf.written["vocab_size"] == 131
        assert "padded" not in "\n".join(hf.notes)

    def test_what_is_not_said_is_noted(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        del arguments["rotary_base"]
        notes = "\n".join(model_of_arguments(save_with(tmp_path, {**arguments, "tokenizer_model": "a/b"})).notes)
        assert "the saved arguments have no rotary_base: Megatron's defaults" in notes
        assert "the output has no tokenizer: copy the files of the one that training used: a/b" in notes
        assert "the defaults of transformers in attention_bias, " in notes
        assert "no bos_token_id, eos_token_id, pad_token_id" in notes

    def test_older_names_of_arguments(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        older = {**arguments, "norm_epsilon": 1e-4, "apply_layernorm_1p": False, "disable_bias_linear": True}
        del older["layernorm_epsilon"], older["add_bias_linear"], older["num_query_groups"]
        hf = model_of_arguments(save_with(tmp_path, {**older, "group_query_attention": False, "kv_channels": None}))
        assert (hf.config["rms_norm_eps"], hf.config["num_key_value_heads"], hf.config["head_dim"]) == (1e-4, 4, 16)

    def test_no_factor_is_a_factor_of_one(self, tmp_path: Path) -> None:
        arguments = arguments_of(TINY_MODELS["GLM-4.5"].make().to_dict())
        hf = model_of_arguments(save_with(tmp_path, {**arguments, "moe_router_topk_scaling_factor": None}))
        assert hf.config["routed_scaling_factor"] == 1.0

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rotary_percent": 0.5}, "nearest is LlamaForCausalLM, but for:\n  rotary_percent: 0.5, but the family"),
            ({"attention_output_gate": True}, "attention_output_gate: True, but the family has False"),
            ({"position_embedding_type": "learned_absolute"}, "position_embedding_type: learned_absolute"),
            (
                {"num_layers": None, "hidden_size": None},
                "num_layers was not saved\n  hidden_size was not saved",
            ),
            ({"hybrid_layer_pattern": "M-*-"}, "hybrid_layer_pattern 'M-\\*-': attention must alternate with MLP"),
        ],
    )
    def test_what_no_family_computes_is_refused(
        self, changes: dict[str, Any], message: str, arguments: dict[str, Any], tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match=message) as error:
            model_of_arguments(save_with(tmp_path, {**arguments, **changes}), architecture="LlamaForCausalLM")
        assert "Give the hf= of the model" in str(error.value)

    def test_several_families_fit(self, tmp_path: Path) -> None:
        checkpoint = save_with(tmp_path, arguments_of(TINY_MODELS["OLMoE"].make().to_dict()))
        with pytest.raises(
            UsageError, match="fit Qwen3MoeForCausalLM, OlmoeForCausalLM: choose one with architecture="
        ):
            model_of_arguments(checkpoint)
        hf = model_of_arguments(checkpoint, architecture="OlmoeForCausalLM")
        assert hf.written["architectures"] == ["OlmoeForCausalLM"]
        with pytest.raises(UnknownArchitectureError, match="nearest: OlmoeForCausalLM"):
            model_of_arguments(checkpoint, architecture="OlmoForCausalLM")


ODD: tuple[Any, ...] = (0, 7, 1e9, [], [0, 0])


def test_numbers_that_no_model_has_are_never_a_foreign_error() -> None:
    """Every table of every family is written from arguments with one odd number: it fits, or is refused in words."""
    tried = 0
    for name in ONE_KIND:
        config = TINY_MODELS[name].make()
        family = family_of({"architectures": config.architectures})
        settings = family.settings({**config.to_dict(), "architectures": config.architectures})
        for setting, odd in product(settings, ODD):
            with contextlib.suppress(CheckpointError):  # of another type than Megatron gives it
                found = from_arguments(to_arguments({**settings, setting: odd}))
                attempt = _attempt(family, {"vocab_size": 131, **found}, torch.bfloat16, {}, padded=False)
                assert (attempt.hf is None) == bool(attempt.problems)
                tried += 1
    assert tried > 1000


def test_layers_without_rope_at_a_distance() -> None:
    settings = from_arguments({"num_layers": 4, "no_rope_freq": 2})
    assert settings["no_rope_freq"] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("DeepSeek-V3", {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
        ("MiniMax-M2", {"scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True, "rotary_dim": 16}),
        (
            "Hunyuan 3",
            {"expert_hidden_dim": 32, "first_k_dense_replace": 1, "route_norm": True, "qk_norm": True},
        ),
    ],
)
def test_fields_that_only_engines_read(name: str, fields: Mapping[str, Any]) -> None:
    """vLLM loads a checkpoint with these: `make test-vllm-families`."""
    config = TINY_MODELS[name].make()
    written = there_and_back({**config.to_dict(), "architectures": config.architectures}).written
    assert {field: written.get(field) for field in fields} == fields
