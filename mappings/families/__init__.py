"""The model families, and which one a Hugging Face config belongs to."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from amaxbridge.mappings.errors import UnknownArchitectureError
from amaxbridge.mappings.families.arcee import ARCEE
from amaxbridge.mappings.families.classifiers import classifiers_of
from amaxbridge.mappings.families.deepseek_v2 import DEEPSEEK_V2
from amaxbridge.mappings.families.deepseek_v3 import DEEPSEEK_V3
from amaxbridge.mappings.families.ernie4_5 import ERNIE4_5
from amaxbridge.mappings.families.ernie4_5_moe import ERNIE4_5_MOE
from amaxbridge.mappings.families.exaone4 import EXAONE4
from amaxbridge.mappings.families.gemma import GEMMA2, GEMMA3, GEMMA3_MULTIMODAL
from amaxbridge.mappings.families.glm4 import GLM, GLM4
from amaxbridge.mappings.families.glm4_moe import DOTS1, GLM4_MOE
from amaxbridge.mappings.families.glm4_moe_lite import GLM4_MOE_LITE
from amaxbridge.mappings.families.gpt_oss import GPT_OSS
from amaxbridge.mappings.families.granite import GRANITE, GRANITE_MOE
from amaxbridge.mappings.families.granite_hybrid import GRANITE_HYBRID
from amaxbridge.mappings.families.hunyuan_v1 import HUNYUAN_DENSE_V1, HUNYUAN_MOE_V1
from amaxbridge.mappings.families.hy_v3 import HY_V3
from amaxbridge.mappings.families.kimi_k25 import KIMI_K25
from amaxbridge.mappings.families.llama import LLAMA, MINISTRAL3, MISTRAL
from amaxbridge.mappings.families.llama4 import LLAMA4, LLAMA4_VISION
from amaxbridge.mappings.families.mimo import MIMO
from amaxbridge.mappings.families.minimax_m2 import MINIMAX_M2
from amaxbridge.mappings.families.mixtral import MIXTRAL
from amaxbridge.mappings.families.nemotron_h import NEMOTRON_H
from amaxbridge.mappings.families.olmo2 import OLMO2, OLMO3
from amaxbridge.mappings.families.olmoe import OLMOE
from amaxbridge.mappings.families.phi3 import PHI3
from amaxbridge.mappings.families.qwen2 import QWEN2, SEED_OSS
from amaxbridge.mappings.families.qwen2_moe import QWEN2_MOE
from amaxbridge.mappings.families.qwen3 import QWEN3
from amaxbridge.mappings.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from amaxbridge.mappings.families.qwen3_moe import QWEN3_MOE
from amaxbridge.mappings.families.qwen3_next import QWEN3_NEXT
from amaxbridge.mappings.families.qwen_vision import (
    QWEN2_5_VL,
    QWEN3_5_MOE_VISION,
    QWEN3_5_VISION,
    QWEN3_VL,
    QWEN3_VL_MOE,
)
from amaxbridge.mappings.families.smollm3 import SMOLLM3
from amaxbridge.mappings.families.sparse_attention import DEEPSEEK_V32, GLM_MOE_DSA
from amaxbridge.mappings.family import ModelFamily

__all__ = ["CLASSIFIERS", "FAMILIES", "classes_of", "family_of", "language_model_of", "relative_of"]

FAMILIES: tuple[ModelFamily, ...] = (
    LLAMA,
    MISTRAL,
    ARCEE,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    QWEN3_NEXT,
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_5_VISION,
    QWEN3_5_MOE_VISION,
    QWEN3_VL,
    QWEN3_VL_MOE,
    QWEN2_5_VL,
    MIXTRAL,
    OLMOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    KIMI_K25,
    DEEPSEEK_V32,
    GLM_MOE_DSA,
    GLM4_MOE,
    GLM4_MOE_LITE,
    GPT_OSS,
    GEMMA2,
    GEMMA3,
    GEMMA3_MULTIMODAL,
    NEMOTRON_H,
    SEED_OSS,
    GLM4,
    ERNIE4_5,
    EXAONE4,
    SMOLLM3,
    PHI3,
    OLMO2,
    OLMO3,
    GRANITE,
    GRANITE_MOE,
    GRANITE_HYBRID,
    MINIMAX_M2,
    HY_V3,
    LLAMA4,
    LLAMA4_VISION,
    ERNIE4_5_MOE,
    MINISTRAL3,
    HUNYUAN_DENSE_V1,
    HUNYUAN_MOE_V1,
    DOTS1,
    GLM,
    MIMO,
)

CLASSIFIERS: tuple[ModelFamily, ...] = tuple(each for family in FAMILIES for each in classifiers_of(family))
"""Reward models, critics and classifiers of these families."""

_BY_ARCHITECTURE = {name: family for family in (*FAMILIES, *CLASSIFIERS) for name in family.architectures}


def classes_of(hf_config: Mapping[str, Any]) -> tuple[str, ...]:
    """The architectures of this language model with a head in place of its output layer."""
    named = hf_config.get("architectures") or []
    return tuple(name for each in CLASSIFIERS if each.classifier_of in named for name in each.architectures)


def language_model_of(architecture: str) -> str | None:
    """The architecture of the language model that a classifier here was made of; None for any other architecture."""
    family = _BY_ARCHITECTURE.get(architecture)
    return family.classifier_of if family else None


def relative_of(architecture: str) -> str | None:
    """The architecture whose model this one has, if transformers lacks this one; None for any other."""
    family = _BY_ARCHITECTURE.get(architecture)
    return family.language_model[0] if family and family.language_model and not family.carried else None


def family_of(hf_config: Mapping[str, Any]) -> ModelFamily:
    """The family that claims the `architectures` of a Hugging Face config.

    Raises:
        UnknownArchitectureError: no family does. The message names the nearest known architectures.
    """
    names = hf_config.get("architectures") or []
    for name in names:
        if name in _BY_ARCHITECTURE:
            return _BY_ARCHITECTURE[name]
    near = [match for name in names for match in get_close_matches(name, _BY_ARCHITECTURE, n=3, cutoff=0.3)]
    raise UnknownArchitectureError(
        f"no model family for architecture {', '.join(names) or '(none given)'} of config.json; "
        f"{'nearest' if near else 'known'}: {', '.join(near or _BY_ARCHITECTURE)}. "
        "A model of your own is converted by a file of about 50 lines, family=FILE.py: see docs/custom-models.md"
    )
