"""Published models: how many parameters each has, and its config.json from `tests/published_models/`.

Where no published file was at hand, the defaults of transformers' class stand for it: ERNIE-4.5, GLM-4-9B,
GLM-4-9B-chat, HY-V3 and SmolLM3-3B, whose sizes they are, and those named `defaults`. GLM-4.7-Flash is as vLLM's tests
quote it.
"""

import json
from collections.abc import Mapping
from typing import Any

from amaxbridge.mappings.families import family_of
from tests.support.paths import PUBLISHED_MODELS

PARAMETERS = {  # as published: to the last one, or in billions; without MTP layers
    "Arcee-defaults": 4_022_766_080,
    "DeepSeek-V2-Lite": "16B",
    "DeepSeek-V2.5": "236B",
    "DeepSeek-V3": "671B",
    "DeepSeek-V3.2": "672B",
    "Devstral-2-123B": "125B",  # which its name makes 123
    "ERNIE-4.5-0.3B": 360_748_032,
    "ERNIE-4.5-21B-A3B": "22B",
    "EXAONE-4.0-32B": "32B",
    "GLM-4-9B": 9_400_279_040,
    "GLM-4.7-Flash": "30B",
    "GLM-4.5-Air": "107B",  # 106.85, which its model card cuts to 106
    "GLM-5": "744B",
    "GLM-5.2": "743B",
    "GPT-OSS-20B": "21B",
    "GLM-4-9B-chat": 9_399_951_360,
    "Granite-defaults": 6_738_415_616,
    "Granite-4-defaults": 38_601_064_448,
    "Granite-MoE-defaults": 37_039_116_288,
    "Gemma-2-9B": 9_241_705_984,
    "Gemma-3-1B": 999_885_952,
    "Gemma-3-4B": "4B",  # its language model
    "HY-V3": "295B",
    "Kimi-K2-Instruct": 1_026_408_232_448,
    "Hunyuan-MoE-defaults": "78B",
    "Hunyuan-dense-defaults": "9B",
    "Kimi-K2.5": 1_026_408_232_448,  # its language model
    "Llama-2-7B": 6_738_415_616,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-4-Maverick": "401B",  # its language model
    "Llama-4-Maverick-text": "401B",  # the language models of both
    "Llama-4-Scout-text": "108B",
    "MiMo-7B-Base": "8B",
    "MiniMax-M2.5": "229B",
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mixtral-8x7B": 46_702_792_704,
    "OLMo-2-defaults": 6_888_624_128,
    "OLMoE-1B-7B": 6_919_161_856,
    "Moonlight-16B-A3B": "16B",
    "Nemotron-3-Nano-30B-A3B": "32B",
    "Nemotron-3-Super-120B-A12B": "121B",
    "Nemotron-H-8B": "8B",
    "Olmo-3.1-32B": "32B",
    "Phi-4": 14_659_507_200,
    "Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen3-8B": 8_190_735_360,
    "Qwen2.5-VL-7B": "8B",  # the language model, as for all with images
    "Qwen3-VL-30B-A3B": "31B",
    "Qwen3-VL-4B": "4B",
    "Qwen3.5-27B": "27B",
    "Qwen3.5-35B-A3B": "35B",
    "Qwen3.5-27B-text": "27B",  # text_config of the published config.json, with the architecture of that part
    "Qwen3.5-35B-A3B-text": "35B",  # likewise
    "Qwen3-Coder-Next-E336": "53B",  # Qwen3-Coder-Next, of 80B, with 336 of its 512 experts in a layer
    "Seed-OSS-36B": "36B",
    "SmolLM3-3B": 3_075_098_624,
    "dots.llm1-defaults": "161B",
}

_DSA = "Megatron has sparse attention on Transformer Engine's layers only"

NOT_BUILT = {  # what Megatron lacks, of models whose names and shapes alone are compared
    "DeepSeek-V3.2": _DSA,
    "GLM-5": _DSA,
    "GLM-5.2": _DSA,
    "DeepSeek-V2.5": "ranks a group of experts by its best 2 (num_experts_per_tok=6 divided by topk_group=3)",
    "Devstral-2-123B": "scales only as rope_type 'llama3'",
    "ERNIE-4.5-21B-A3B": "adds a bias to softmax scores",
    "Granite-4-defaults": "lacks Granite's multipliers",
    "Llama-4-Scout-text": "scales only as rope_type 'llama3'",
    "Olmo-3.1-32B": "the same in all layers",
}


def with_images() -> set[str]:
    """The models of which Megatron has the language model."""
    files = {name: json.loads((PUBLISHED_MODELS / f"{name}.json").read_text()) for name in PARAMETERS}
    return {name for name, config in files.items() if family_of(config).carried}


def published(name: str) -> Any:
    return configured(json.loads((PUBLISHED_MODELS / f"{name}.json").read_text()))


def configured(written: Mapping[str, Any]) -> Any:
    """transformers' configuration of a config.json; one with a `model_type` of its own is of its architecture's."""
    import transformers

    if written["model_type"] in transformers.CONFIG_MAPPING:
        return transformers.AutoConfig.for_model(**written)
    kind = class_of(written).config_class
    return kind.from_dict({name: value for name, value in written.items() if name not in ("model_type", "auto_map")})


def class_of(written: Mapping[str, Any]) -> Any:
    """transformers' model class of a config.json, which it may spell otherwise than published files: Kimi_K25…"""
    import transformers

    (name,) = written["architectures"]
    spelled = name.replace("KimiK25", "Kimi_K25")
    return getattr(transformers, name, None) or getattr(transformers, spelled, None) or _relative(written)


def _relative(written: Mapping[str, Any]) -> Any:
    """The class whose model an architecture has, which transformers lacks itself."""
    import transformers

    relative = family_of(written).language_model
    assert relative is not None
    return getattr(transformers, relative[0])
