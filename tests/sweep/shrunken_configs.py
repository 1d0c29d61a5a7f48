"""Tiny configurations of every model type, made from the defaults of transformers.

`tiny_config` walks the fields of a configuration class and of its parts, and shrinks what is a size by the first rule
of `RULES` that matches the field's name. Fields that transformers computes from others stay unset, so that it computes
them anew. There are as many layers as it takes for every kind of layer to occur. What the rules cannot know stands in
`EXCEPTIONS`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

VOCABULARY = 400
FIRST_SPECIAL = 320  # ids of images, turns and the like; prompts use smaller ones

# Sizes in which input, output and expert dims differ, and every input is a multiple of 32. With SQUARE_FFN, packed gate
# and up are square, so that no shape says which side is the input.
HIDDEN, FFN, EXPERT_FFN, SQUARE_FFN, HEADS, KV_HEADS, HEAD_DIM, EXPERTS = 64, 160, 96, 32, 4, 2, 32, 4

Rule = tuple[str, Any]
RULES: tuple[Rule, ...] = (
    (r"(\w+_)?vocab_size(_per_layer_input)?|num_embeddings", VOCABULARY),
    (
        r"num_hidden_layers|num_layers|n_layers?|num_(encoder|decoder)_layers|(encoder|decoder)(_num_hidden)?_layers",
        None,
    ),
    (r"(\w+_)?(layers|depth|num_blocks)", 2),
    (r"num_key_value_heads|(\w+_)?num_key_value_heads|num_kv_heads|multi_query_groups", KV_HEADS),
    (r"(\w+_)?(num_attention_heads|attention_heads|num_heads|n_heads?|n_kv_heads)", HEADS),
    (r"qk_nope_head_dim|qk_rope_head_dim", 16),
    (r"head_dim|d_kv|kv_channels|attention_head_dim|(\w+_)?head_dim|dim_head|attention_head_size", HEAD_DIM),
    (r"(\w+_)?kv_lora_rank|(\w+_)?q_lora_rank|(\w+_)?lora_rank", 32),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|num_experts_per_token|top_k_experts", 2),
    (r"(moe_)?num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_experts", EXPERTS),
    (r"rotary_dim", 16),
    (r"n_group|num_expert_group|topk_group", 1),
    (r"first_k_dense_replace|num_dense_layers|num_shared_experts|n_shared_experts|moe_num_shared_experts", 1),
    (r"(moe_|expert_ffn_|shared_expert_|shared_|moe_shared_expert_)\w*(intermediate|hidden)_size", EXPERT_FFN),
    (
        r"(\w+_)?(intermediate_size|ffn_dim|ffn_hidden_size|ffn_size|d_ff|mlp_dim|ff_dim|feed_forward_size|inner_dim)",
        FFN,
    ),
    (r"(\w+_)?(intermediate|linear)_(size|units)\w*", FFN),
    (
        r"(\w+_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|projection_dim|dim_model|d_embed)",
        HIDDEN,
    ),
    (r"(max_position_embeddings|n_positions|max_(source|target|encoder|decoder)_position\w*|max_seq_len|n_ctx)", 128),
    (r"output_dim", HIDDEN),
    (r"adapter_(in|out)_dim|adapter_(in|out)put_size", HIDDEN),
    (r"upsample_initial_channel|decoder_dim|vision_output_dim|projector_(in|out)put_dim", HIDDEN),
    (r"num_filters", 8),
    (r"image_size", 32),
    (r"patch_size", 8),
    (r"sliding_window|attention_window_size|attention_chunk_size|local_attention", 16),
)
_COMPILED = tuple((re.compile(pattern), value) for pattern, value in RULES)
_SPECIAL = re.compile(r"\w*(token_id|token_index|token_ids|_id|eos|bos)")

_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
_ROPES = {"rope_type": "default", "rope_theta": 10000.0}
_IMAGE_WORDS = {"<image>": 330, "IMGIMGAAZ": 331, "IMGIMGABZ": 332}
_SOUND = {"downsampling_ratios": [2, 2], "depths": [1, 1, 1], "num_filters": 8}

# What transformers demands of types that it cannot make without arguments.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 30,
        }
    },
}
# Per model type, of a configuration or of a sub-configuration (whose class stands for it where it has no type of its
# own), or of a field of another (`type.field`): fields that the rules get wrong, or that have no default.
EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    "gemma4_assistant": {"backbone_hidden_size": HIDDEN},
    "gemma4_assistant.text_config": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 6,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "enable_moe_block": False,
    },
    "gemma4_unified_assistant": {"backbone_hidden_size": HIDDEN},
    "gemma4_unified_assistant.text_config": {"num_hidden_layers": 6, "num_kv_shared_layers": 6},
    "apertus1p5": {"image_token_offset": 330, "audio_token_offset": 346},
    "apertus1p5_vision_tokenizer": {"codebook_size": 16, "base_channels": 32, "channel_multiplier": [1, 1]},
    "wavtokenizer_encoder": {"codebook_dim": HIDDEN, "codebook_size": 16},
    "diffusion_gemma_text": {"num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": EXPERT_FFN},
    "hy_v4_vl_text": {"qk_rope_head_dim": 32},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense", "sparse"],
        "num_hidden_layers": 2,
        "num_experts_per_tok": 2,
    },
    "dots3_note_text": {
        "num_hidden_layers": 4,
        "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "num_key_value_heads": HEADS,
        "per_layer_config": {
            layer: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 64} for layer in ("02", "03")
        },
    },
    "moonshine_streaming": {"num_key_value_heads": KV_HEADS},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": EXPERT_FFN},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": EXPERT_FFN},
    "bamba": _MAMBA2,
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128},
    "granitemoehybrid": _MAMBA2,
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": {"vocabulary_map": _IMAGE_WORDS},
    "chameleon_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "resolution": 32},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPES, "full_attention": _ROPES},
    },
    "mimi": {"upsample_groups": HIDDEN},
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "kv_n_heads": KV_HEADS},
    "dbrx": {"num_key_value_heads": KV_HEADS},
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": EXPERT_FFN,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": EXPERT_FFN,
    },
    "emu3": {"vocabulary_map": {"<image>": 330, "<|visual token 000000|>": 331, "<|extra_200|>": 332}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1], "attn_resolutions": []},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [EXPERT_FFN, 32],
        "rope_parameters": {**_ROPES, "mrope_section": [3, 3, 2]},
    },
    "fast_vlm.vision_config": {
        "architecture": "fastvit_mci3",
        "do_pooling": True,
        "global_pool": "avg",
        "hidden_size": 64,
        "image_size": 16,
        "model_args": {
            "inference_mode": True,
            "layers": (2, 2),
            "embed_dims": (16, 32),
            "mlp_ratios": (4, 4),
            "se_downsamples": (False, False),
            "downsamples": (False, True),
            "pos_embs": (None, None),
            "token_mixers": ("repmixer", "attention"),
            "lkc_use_act": True,
            "stem_use_scale_branch": False,
        },
    },
    "perception_lm.vision_config": {
        "architecture": "vit_pe_core_large_patch14_336",
        "model_args": {
            "embed_dim": HIDDEN,
            "img_size": (14, 14),
            "depth": 2,
            "global_pool": "",
            "use_post_transformer_norm": False,
            "init_values": 0.1,
            "ref_feat_shape": (1, 1),
        },
    },
    "florence_vision": {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [32, 64],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
    },
    "FunAsrNanoAdaptorConfig": {"intermediate_size": HIDDEN // 4},
    "gemma3n_text": {
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 32,
        "intermediate_size": FFN,
        "laurel_rank": 16,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "hidden_size_per_layer_input": 32,
        "num_kv_shared_layers": 0,
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": 2,
        "moe_intermediate_size": EXPERT_FFN,
    },
    "glm5_next_text": {
        "num_key_value_heads": HEADS,
        "qk_rope_head_dim": 0,
        "qk_nope_head_dim": 32,
        "head_dim": 0,
        "index_topk": 32,
        "index_kpool": 4,
        "indexer_types": None,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "GradiumPhononTTSFlowHeadConfig": {"condition_dim": HIDDEN},
    "PocketTTSFlowHeadConfig": {"condition_dim": HIDDEN},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 0, 1, 1],
    },
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM, "num_experts": EXPERTS, "moe_topk": 2},
    "hunyuan_vl_text": {"head_dim": HEAD_DIM},
    "janus_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "llama4_text": {"interleave_moe_layer_step": 2, "moe_layers": None, "num_hidden_layers": 4},
    "longcat_flash": {"zero_expert_num": 2},
    "ministral": {"head_dim": HEAD_DIM},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {
        "patch_sizes": [4, 2],
        "hidden_sizes": [32, 64],
        "depths": [1, 1],
        "num_hidden_layers": 2,
    },
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "radio": {"video_temporal_patch_size": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 16,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
    },
    "vibevoice_acoustic_tokenizer_encoder": _SOUND,
    "vibevoice_acoustic_tokenizer_decoder": _SOUND,
    "vibevoice_acoustic_tokenizer": _SOUND,
    "xlm": {"emb_dim": HIDDEN},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 32,
        "num_key_value_heads": HEADS,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
        "n_mamba_heads": 8,
        "mamba_d_state": 16,
        "num_key_value_heads": HEADS,
    },
}


def tiny_config(kind: type[Any], *, square: bool = False) -> Any:
    """A tiny configuration of a class of configurations; with `square`, twice the FFN size is the hidden size."""
    return _shrink(kind(**DEFAULTS.get(kind.model_type, {})), square, place="")


def _shrink(full: Any, square: bool, *, place: str) -> Any:
    kind = type(full)
    layers = _layers(full)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        name = field.name
        try:
            value = getattr(full, name, None)
        except Exception:  # transformers refuses to name one value where layers differ
            value = field.default
        if _is_config(value):
            fields[name] = _shrink(value, square, place=f"{kind.model_type}.{name}")
        elif isinstance(value, dict) and "mrope_section" in value:
            fields[name] = _shrink_dict(value, layers)
        elif field.default is None or field.default is dataclasses.MISSING or isinstance(value, bool):
            continue
        elif isinstance(value, int):
            fields[name] = _small(name, value, layers)
        elif isinstance(value, dict):
            fields[name] = _shrink_dict(value, layers)
        elif isinstance(value, list | tuple) and len(value) > layers and all(isinstance(each, str) for each in value):
            fields[name] = type(value)(value[:layers])
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields |= EXCEPTIONS.get(kind.model_type or kind.__name__, {})
    fields |= EXCEPTIONS.get(place, {})
    if square:
        fields |= {
            name: SQUARE_FFN
            for name, value in fields.items()
            if ("intermediate" in name or "ffn" in name) and value in (FFN, EXPERT_FFN)
        }
    return kind(**fields)


def _shrink_dict(full: Mapping[Any, Any], layers: int) -> dict[Any, Any]:
    """A dict of sizes; one with an entry for each of some layers keeps those of the first."""
    shrunk = {}
    for name, value in full.items():
        if str(name).isdigit() and isinstance(value, dict) and int(name) >= layers:
            continue
        if isinstance(value, dict):
            shrunk[name] = _shrink_dict(value, layers)
        elif name == "mrope_section":
            shrunk[name] = [6, 5, 5]
        elif isinstance(value, int) and not isinstance(value, bool):
            shrunk[name] = _small(str(name), value, layers)
        else:
            shrunk[name] = value
    return shrunk


def _small(name: str, value: int, layers: int) -> int:
    if _SPECIAL.fullmatch(name):
        return value if value < FIRST_SPECIAL else FIRST_SPECIAL + value % (VOCABULARY - FIRST_SPECIAL)
    for pattern, small in _COMPILED:
        if pattern.fullmatch(name):
            return min(value, layers if small is None else int(small))
    return value


def _layers(full: Any) -> int:
    """The fewest layers in which every kind of layer occurs; at least two."""
    counted = getattr(full, "num_hidden_layers", None) or 0
    fewest = 2
    for value in vars(full).values():
        if (
            isinstance(value, list | tuple)
            and counted
            and len(value) == counted
            and not isinstance(value[0], float | list)
        ):
            first = {kind: value.index(kind) for kind in value}
            if len(first) < counted:
                fewest = max(fewest, 1 + max(first.values()))
    return fewest


def _is_config(value: object) -> bool:
    from transformers import PreTrainedConfig

    return isinstance(value, PreTrainedConfig)
