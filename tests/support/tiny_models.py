"""One tiny model of each family: what `parity.py` builds on both sides. A new family adds a row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SIZES: Mapping[str, Any] = {
    "vocab_size": 131,  # odd, so that TP=2 must pad it
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.08,
    "pad_token_id": None,  # the default of some classes lies beyond this vocabulary
}
DENSE: tuple[Mapping[str, int], ...] = ({"tp": 1}, {"tp": 2})
MOE: tuple[Mapping[str, int], ...] = (*DENSE, {"tp": 1, "ep": 2})
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,  # 500,000 in Llama: here, that scaling shows at all on 32 tokens
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

NEMOTRON_H: Mapping[str, Any] = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "linear_attention"],
    "head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 8,
    "time_step_min": 1e-30,  # transformers cuts steps off there, Megatron does not
    "n_routed_experts": 8,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "n_group": 2,
    "routed_scaling_factor": 2.5,
}

LATENT: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
"""DeepSeek's latent attention, and experts after a dense layer."""
DELTA_NET: Mapping[str, Any] = {
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
}


@dataclass(frozen=True)
class TinyModel:
    """A row of the table.

    Args:
        make: the configuration; imports transformers, which takes seconds, when called.
        meshes: parallel sizes to build it at, as `megatron.distributed` takes them; they need one or two processes.
        unbuildable: why Megatron cannot build it on a CPU; then its names and shapes are all that is tested.
        prepare: what a random model of the family needs beyond `save_tiny_model`'s own care.
        model_class: Megatron's, as `megatron.build_model` takes it.
        files: makes published files of those that transformers wrote, if they differ: tensors by name, in place.
        part: attribute of transformers' model that computes logits, if the whole does not without images.
        save: writes its files and logits, if transformers does not save it under the names of published files.
    """

    make: Callable[[], "PreTrainedConfig"]
    meshes: tuple[Mapping[str, int], ...] = DENSE
    unbuildable: str = ""
    prepare: Callable[[Any], None] = field(default=lambda model: None)
    model_class: str | None = None
    files: Callable[[dict[str, Any]], None] | None = None
    part: str | None = None
    save: Callable[["TinyModel", Path], None] | None = None


def config(architecture: str, **changes: Any) -> Callable[[], "PreTrainedConfig"]:
    """Makes the configuration of an architecture, with `SIZES` and then `changes`."""

    def make() -> "PreTrainedConfig":
        import transformers

        kind = getattr(transformers, architecture).config_class
        made: PreTrainedConfig = kind(**{**SIZES, "architectures": [architecture], **changes})
        return made

    return make


def randomize(model: Any) -> None:
    """Norms and biases at random: at 1 and 0, where they start, one that is left out would not show.

    Routers choose by a wide margin, so that a last bit of difference does not change which experts are chosen.
    """
    import torch

    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith(("bias", "sinks")) or ".gate." in name or ".router." in name:
            torch.nn.init.normal_(parameter, std=0.5)


def expert_biases(model: Any) -> None:
    """Sets the routers' biases, in fp32 as DeepSeek stores them."""
    import torch

    for module in model.modules():
        if "e_score_correction_bias" in dict(module.named_buffers(recurse=False)):
            module.e_score_correction_bias = 0.1 * torch.randn(8)


def _narrow_routers(model: Any) -> None:
    """Keeps router scores small: Megatron compares their sigmoids, all of them one in fp32 from a score of 17 on."""
    import torch

    for name, parameter in model.named_parameters():
        if ".router." in name:
            torch.nn.init.normal_(parameter, std=0.1)


def inputs_first(tensors: dict[str, Any]) -> None:
    """Packed experts as Qwen3-VL-MoE was published: inputs before outputs."""
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name].transpose(1, 2).contiguous()


def _wide_experts(model: Any) -> None:
    """Makes the experts' weights so large that gate and up reach the limits at which they are clamped."""
    import torch

    for name, parameter in model.named_parameters():
        if name.endswith("gate_up_proj"):
            torch.nn.init.normal_(parameter, std=0.5)


def _gemma3_with_images() -> "PreTrainedConfig":
    """The configuration of a Gemma 3 with images, whose language model is what Megatron builds."""
    from transformers import Gemma3Config

    text = {**SIZES, "head_dim": 32, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3Config(
        architectures=["Gemma3ForConditionalGeneration"],
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )


def _qwen_with_images(
    architecture: str, sections: list[int], vision: Mapping[str, Any], **text: Any
) -> Callable[[], "PreTrainedConfig"]:
    """Makes the configuration of a Qwen with images, whose language model is what Megatron builds.

    Args:
        sections: how many rotary frequencies are for time, height and width; text has the same position in all.
    """

    def make() -> "PreTrainedConfig":
        import transformers

        kind = getattr(transformers, architecture).config_class
        sizes = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
        made: PreTrainedConfig = kind(
            architectures=[architecture],
            text_config={**SIZES, "rope_parameters": rope, **text},
            vision_config={**sizes, "patch_size": 4, **vision},
            tie_word_embeddings=False,
        )
        return made

    return make


DEEPSTACK = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}

GRANITE4: Mapping[str, Any] = {
    "layer_types": ["mamba", "attention"],
    "shared_intermediate_size": 48,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
_NO_MULTIPLIERS = "Megatron's HybridModel lacks Granite's multipliers"

TINY_MODELS: dict[str, TinyModel] = {
    "Llama 2": TinyModel(config("LlamaForCausalLM", num_key_value_heads=4)),
    "Llama 3, tied": TinyModel(
        config("LlamaForCausalLM", rope_parameters=LLAMA3, max_position_embeddings=16384, tie_word_embeddings=True)
    ),
    "Mistral, window of 5": TinyModel(config("MistralForCausalLM", sliding_window=5)),
    "Arcee": TinyModel(config("ArceeForCausalLM")),
    "Qwen2.5": TinyModel(config("Qwen2ForCausalLM")),
    "Qwen3": TinyModel(config("Qwen3ForCausalLM", head_dim=32)),
    "Qwen3, tied": TinyModel(config("Qwen3ForCausalLM", head_dim=32, tie_word_embeddings=True)),
    "Qwen1.5-MoE": TinyModel(
        config(
            "Qwen2MoeForCausalLM",
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=64,
            mlp_only_layers=[0],
        ),
        MOE,
    ),
    "Qwen3-MoE": TinyModel(
        config(
            "Qwen3MoeForCausalLM",
            head_dim=32,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            norm_topk_prob=True,
        ),
        MOE,
    ),
    "Qwen3-Next": TinyModel(
        config(
            "Qwen3NextForCausalLM",
            **DELTA_NET,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=64,
            mlp_only_layers=[1],
        ),
        MOE,
    ),
    "Qwen3.5": TinyModel(config("Qwen3_5ForCausalLM", **DELTA_NET)),
    "Qwen3.5-MoE": TinyModel(
        config(
            "Qwen3_5MoeForCausalLM",
            **DELTA_NET,
            intermediate_size=None,  # no layer has an MLP
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=64,
        ),
        MOE,
    ),
    "Mixtral": TinyModel(config("MixtralForCausalLM", num_local_experts=8, num_experts_per_tok=2), MOE),
    "OLMoE": TinyModel(
        config("OlmoeForCausalLM", num_key_value_heads=4, num_experts=8, num_experts_per_tok=2, norm_topk_prob=False),
        MOE,
    ),
    "DeepSeek-V2": TinyModel(
        config(
            "DeepseekV2ForCausalLM",
            **LATENT,
            n_shared_experts=2,
            num_experts_per_tok=2,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=16.0,
            q_lora_rank=32,
            rope_parameters={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        ),
        MOE,
    ),
    "DeepSeek-V2-Lite": TinyModel(
        config(
            "DeepseekV2ForCausalLM",
            **LATENT,
            n_shared_experts=2,
            num_experts_per_tok=3,
            n_group=1,
            topk_group=1,
            q_lora_rank=None,
        ),
        MOE,
    ),
    "DeepSeek-V3": TinyModel(
        config(
            "DeepseekV3ForCausalLM",
            **LATENT,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            q_lora_rank=32,
            num_nextn_predict_layers=0,
            rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        ),
        MOE,
        prepare=expert_biases,
    ),
    "Moonlight": TinyModel(
        config(
            "DeepseekV3ForCausalLM",
            **LATENT,
            n_shared_experts=2,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            q_lora_rank=None,
            num_nextn_predict_layers=0,
            routed_scaling_factor=2.446,
        ),
        MOE,
        prepare=expert_biases,
    ),
    "Kimi-K2": TinyModel(
        config(
            "DeepseekV3ForCausalLM",
            **LATENT,
            num_experts_per_tok=3,
            n_group=1,
            topk_group=1,
            q_lora_rank=32,
            num_nextn_predict_layers=0,
            routed_scaling_factor=2.827,
            rope_parameters={**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        ),
        MOE,
        prepare=expert_biases,
    ),
    "GLM-4.5": TinyModel(
        config(
            "Glm4MoeForCausalLM",
            head_dim=32,
            moe_intermediate_size=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            attention_bias=True,
            use_qk_norm=True,
            num_nextn_predict_layers=0,
        ),
        MOE,
        prepare=expert_biases,
    ),
    "GLM-4.7-Flash": TinyModel(
        config(
            "Glm4MoeLiteForCausalLM",
            num_key_value_heads=4,
            moe_intermediate_size=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            mlp_layer_types=["dense", "sparse"],
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_nope_head_dim=24,
            qk_rope_head_dim=8,
            v_head_dim=32,
            num_nextn_predict_layers=0,
            rms_norm_eps=1e-6,  # 1e-5 in GLM-4.7-Flash, which transformers' norms of latents do not follow
        ),
        MOE,
        prepare=expert_biases,
    ),
    "GPT-OSS": TinyModel(
        config(
            "GptOssForCausalLM",
            head_dim=32,
            swiglu_limit=7.0,  # transformers' default, which older ones leave out of config.json
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=8,
            tie_word_embeddings=False,
            rope_parameters={**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        ),
        ({"tp": 1}, {"tp": 2, "etp": 1}, {"tp": 1, "ep": 2}),  # Megatron has experts with biases at ETP=1 only
        prepare=_wide_experts,
    ),
    "Gemma 2": TinyModel(
        config(
            "Gemma2ForCausalLM",
            head_dim=32,
            sliding_window=8,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        )
    ),
    "Gemma 3": TinyModel(
        config(
            "Gemma3ForCausalLM",
            head_dim=32,
            sliding_window=8,
            query_pre_attn_scalar=24,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        )
    ),
    "Gemma 3 with images": TinyModel(_gemma3_with_images),
    "Qwen3.5 with images": TinyModel(
        _qwen_with_images("Qwen3_5ForConditionalGeneration", [2, 1, 1], {"num_position_embeddings": 16}, **DELTA_NET)
    ),
    "Qwen3.5-MoE with images": TinyModel(
        _qwen_with_images(
            "Qwen3_5MoeForConditionalGeneration",
            [2, 1, 1],
            {"num_position_embeddings": 16},
            **DELTA_NET,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=64,
        ),
        MOE,
    ),
    "Qwen3-VL with images": TinyModel(
        _qwen_with_images("Qwen3VLForConditionalGeneration", [8, 4, 4], DEEPSTACK, head_dim=32)
    ),
    "Qwen3-VL-MoE with images": TinyModel(
        _qwen_with_images(
            "Qwen3VLMoeForConditionalGeneration",
            [8, 4, 4],
            DEEPSTACK,
            head_dim=32,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
        ),
        MOE,
        files=inputs_first,
    ),
    "Qwen2.5-VL with images": TinyModel(
        _qwen_with_images("Qwen2_5_VLForConditionalGeneration", [2, 3, 3], {"fullatt_block_indexes": [0]})
    ),
    "Nemotron-H": TinyModel(
        config("NemotronHForCausalLM", **NEMOTRON_H),
        MOE,
        prepare=expert_biases,
    ),
    "Seed-OSS": TinyModel(config("SeedOssForCausalLM", head_dim=32)),
    "GLM-4": TinyModel(config("Glm4ForCausalLM", head_dim=32)),
    "ERNIE-4.5": TinyModel(config("Ernie4_5ForCausalLM", head_dim=32)),
    "Exaone 4": TinyModel(
        config("Exaone4ForCausalLM", sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    ),
    "Exaone 4 without windows": TinyModel(
        config("Exaone4ForCausalLM", sliding_window=None, layer_types=["full_attention"] * 2, tie_word_embeddings=True)
    ),
    "SmolLM3": TinyModel(config("SmolLM3ForCausalLM", no_rope_layers=[1, 0])),
    "Phi-3": TinyModel(config("Phi3ForCausalLM", sliding_window=None)),
    "Phi-4-mini": TinyModel(
        config(
            "Phi3ForCausalLM",
            sliding_window=5,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        )
    ),
    "OLMo 2": TinyModel(config("Olmo2ForCausalLM")),
    "OLMo 3": TinyModel(
        config("Olmo3ForCausalLM", sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    ),
    "Granite": TinyModel(
        config(
            "GraniteForCausalLM",
            embedding_multiplier=12.0,
            attention_multiplier=0.3,
            residual_multiplier=0.22,
            logits_scaling=8.0,
        )
    ),
    "Granite, MoE": TinyModel(
        config(
            "GraniteMoeForCausalLM",
            intermediate_size=32,
            num_local_experts=8,
            num_experts_per_tok=2,
            embedding_multiplier=12.0,
            attention_multiplier=0.3,
            residual_multiplier=0.22,
            logits_scaling=8.0,
        ),
        MOE,
    ),
    "Granite 4, MoE": TinyModel(
        config(
            "GraniteMoeHybridForCausalLM",
            **GRANITE4,
            intermediate_size=32,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        unbuildable=_NO_MULTIPLIERS,
    ),
    "Granite 4, dense": TinyModel(
        config("GraniteMoeHybridForCausalLM", **GRANITE4, num_local_experts=0, position_embedding_type="rope"),
        unbuildable=_NO_MULTIPLIERS,
    ),
    "MiniMax-M2": TinyModel(
        config(
            "MiniMaxM2ForCausalLM",
            head_dim=32,
            num_local_experts=8,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        ),
        MOE,
        prepare=expert_biases,
    ),
    "Llama 4": TinyModel(
        config(
            "Llama4ForCausalLM",
            head_dim=32,
            intermediate_size_mlp=128,
            num_local_experts=8,
            num_hidden_layers=4,
            interleave_moe_layer_step=2,
            no_rope_layers=[1, 0, 1, 1],
            attention_chunk_size=8,
            floor_scale=4,
            attn_scale=0.5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        MOE,
        prepare=_narrow_routers,
    ),
    "Ministral 3": TinyModel(
        config(
            "Ministral3ForCausalLM",
            head_dim=32,
            sliding_window=5,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "llama_4_scaling_beta": 0.0,
                "original_max_position_embeddings": 64,
            },
        )
    ),
    "ERNIE-4.5-MoE": TinyModel(
        config(
            "Ernie4_5_MoeForCausalLM",
            num_hidden_layers=3,
            moe_num_experts=8,
            moe_k=2,
            moe_intermediate_size=32,
            moe_layer_start_index=1,
        ),
        unbuildable="Megatron adds a router's bias to sigmoid scores only",
    ),
    "Hunyuan, dense": TinyModel(config("HunYuanDenseV1ForCausalLM", head_dim=32)),
    "Hunyuan, dense, stretched": TinyModel(
        config(
            "HunYuanDenseV1ForCausalLM",
            head_dim=32,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0},
        )
    ),
    "Hunyuan, MoE": TinyModel(config("HunYuanMoEV1ForCausalLM", head_dim=32, num_experts=8, moe_topk=2), MOE),
    "dots.llm1": TinyModel(
        config(
            "Dots1ForCausalLM",
            head_dim=32,
            moe_intermediate_size=32,
            n_routed_experts=8,
            n_shared_experts=2,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        MOE,
        prepare=expert_biases,
    ),
    "GLM-4, old": TinyModel(config("GlmForCausalLM", head_dim=32)),
    "Hunyuan 3": TinyModel(
        config(
            "HYV3ForCausalLM",
            head_dim=32,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            num_shared_experts=2,
        ),
        MOE,
        prepare=expert_biases,
    ),
    "Nemotron 3 Super, latent experts": TinyModel(
        config("NemotronHForCausalLM", **NEMOTRON_H, moe_latent_size=32),
        MOE,
        prepare=expert_biases,
    ),
}
TINY_MODELS |= {
    f"{name}, HybridModel": replace(TINY_MODELS[name], model_class="hybrid")
    for name in ("Qwen3, tied", "Qwen3-MoE", "DeepSeek-V3", "Qwen3-Next")
}


def save_tiny_model(tiny: TinyModel, directory: Path) -> None:
    """A random fp32 model of the row in Hugging Face's format, and beside it the logits that transformers computes."""
    if tiny.save is not None:
        tiny.save(tiny, directory)
        return
    import torch
    from safetensors.torch import load_file, save_file

    from tests.workers.model import TOKENS

    torch.manual_seed(17)
    model = class_of(config := tiny.make())._from_config(config, dtype=torch.float32).eval()
    randomize(model)
    tiny.prepare(model)
    model.save_pretrained(directory)
    if tiny.files is not None:
        tensors = load_file(directory / "model.safetensors")
        tiny.files(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        speaks = model if tiny.part is None else getattr(model, tiny.part)
        torch.save(speaks(TOKENS).logits, directory / "logits.pt")


def class_of(config: Any) -> Any:
    """transformers' class of the architecture that a configuration names."""
    import transformers

    return getattr(transformers, config.architectures[0])


def _kimi_with_images() -> "PreTrainedConfig":
    from transformers import Kimi_K25Config

    text = TINY_MODELS["Kimi-K2"].make().to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    architectures = ["KimiK25ForConditionalGeneration"]
    return Kimi_K25Config(
        architectures=architectures, text_config=text, vision_config=vision, tie_word_embeddings=False
    )


def _save_kimi(tiny: TinyModel, directory: Path) -> None:
    """As published: Kimi-K2's names behind `language_model.`, the tower's as Moonshot's code has them."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    save_tiny_model(TINY_MODELS["Kimi-K2"], directory)
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(directory / "model.safetensors").items()}
    tower = {
        "vision_tower.patch_embed.proj.weight": (32, 3, 14, 14),
        "vision_tower.patch_embed.pos_emb.weight": (4, 4, 32),
        "vision_tower.encoder.blocks.0.wqkv.weight": (96, 32),
        "vision_tower.encoder.final_layernorm.weight": (32,),
        "mm_projector.pre_norm.weight": (32,),
        "mm_projector.proj.0.weight": (128, 128),
        "mm_projector.proj.2.bias": (64,),
    }
    tensors |= {name: torch.randn(shape) for name, shape in tower.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    tiny.make().save_pretrained(directory)
    written = json.loads((directory / "config.json").read_text())
    written["text_config"] |= {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(written))


TINY_MODELS["Kimi-K2.5 with images"] = TinyModel(_kimi_with_images, MOE, save=_save_kimi)


_INDEXED: Mapping[str, Any] = {
    **LATENT,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 8,
}
_NO_DSA = "Megatron-Core's sparse attention takes Transformer Engine's layers only"
TINY_MODELS |= {
    "DeepSeek-V3.2": TinyModel(config("DeepseekV32ForCausalLM", **_INDEXED), unbuildable=_NO_DSA),
    "GLM-5.2": TinyModel(
        config(
            "GlmMoeDsaForCausalLM",
            **_INDEXED,
            num_hidden_layers=6,
            index_topk_freq=3,
            index_skip_topk_offset=2,
            num_nextn_predict_layers=1,
        ),
        unbuildable=_NO_DSA,
    ),
}


def _llama4_with_images() -> "PreTrainedConfig":
    from transformers import Llama4Config

    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    widths = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32)
    return Llama4Config(
        architectures=["Llama4ForConditionalGeneration"],
        text_config=TINY_MODELS["Llama 4"].make().to_dict(),
        vision_config={**vision, **widths, "image_size": 28, "patch_size": 14},
    )


TINY_MODELS["Llama 4 with images"] = TinyModel(_llama4_with_images, MOE, prepare=_narrow_routers, part="language_model")


def _mimo() -> "PreTrainedConfig":
    """Of transformers' Qwen2, whose decoder it has; transformers has no class of its own for it."""
    from transformers import Qwen2Config

    return Qwen2Config(**{**SIZES, "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 2})


def _save_mimo(tiny: TinyModel, directory: Path) -> None:
    """As published: a Qwen2 and MTP layers, which are random here."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    save_tiny_model(TINY_MODELS["Qwen2.5"], directory)
    tensors = load_file(directory / "model.safetensors")
    last = "model.layers.1."
    like = {name.removeprefix(last): tensor for name, tensor in tensors.items() if name.startswith(last)}
    like |= {f"{norm}.weight": torch.empty(64) for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm")}
    like["input_proj.weight"] = torch.empty(64, 128)
    tensors |= {
        f"model.mtp_layers.{layer}.{name}": torch.randn(tensor.shape)
        for layer in range(2)
        for name, tensor in like.items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    tiny.make().save_pretrained(directory)
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**written, "model_type": "mimo"}))


TINY_MODELS["MiMo"] = TinyModel(_mimo, DENSE, save=_save_mimo)
