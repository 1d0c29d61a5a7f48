"""The Qwen models with images and video: Qwen3.5 and 3.6, Qwen3-VL, Qwen2.5-VL, dense and with experts.

Megatron has the language model; exports copy the rest unchanged. Positions of text alone are those of an ordinary
rotary embedding, which is what a model is built with. Published Qwen3-VL files hold the experts of a layer as one
tensor with inputs first, transformers writes it with outputs first; either is read, and inputs first is written, as
vLLM reads it.
"""

from dataclasses import replace

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.families.qwen2 import QWEN2
from amaxbridge.mappings.families.qwen3 import QWEN3
from amaxbridge.mappings.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from amaxbridge.mappings.families.qwen3_moe import QWEN3_MOE
from amaxbridge.mappings.family import ModelFamily, PackedExperts, fixed


def _inside(name: str) -> str:
    """A language model's tensor in the files of the whole; output layer and MTP layers keep their names."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def _with_vision(family: ModelFamily, architecture: str) -> ModelFamily:
    return replace(
        family,
        architectures=(architecture,),
        mappings=tuple(mapping.rename(mapping.megatron_param, _inside) for mapping in family.mappings),
        language_part="text_config",
        carried=("model.visual.",),
    )


QWEN3_5_VISION = _with_vision(QWEN3_5, "Qwen3_5ForConditionalGeneration")
QWEN3_5_MOE_VISION = _with_vision(QWEN3_5_MOE, "Qwen3_5MoeForConditionalGeneration")
QWEN3_VL = _with_vision(QWEN3, "Qwen3VLForConditionalGeneration")
QWEN3_VL_MOE = replace(
    _with_vision(QWEN3_MOE, "Qwen3VLMoeForConditionalGeneration"),
    transformer={**QWEN3_MOE.transformer, "moe_router_pre_softmax": fixed(False)},
    computes={**decoder.PLAIN_DECODER, "norm_topk_prob": True},
    packed_experts=PackedExperts(transposed=True, either=True),
)
QWEN2_5_VL = replace(
    QWEN2,
    architectures=("Qwen2_5_VLForConditionalGeneration",),
    language_part="text_config",
    carried=("visual.",),
    respelled={"model.language_model.": "model.", "model.visual.": "visual."},
)
"""Published files call the language model what it was called alone; newer ones have transformers' names of today."""
