"""Reward models, critics and classifiers: a language model with a head of a few rows in place of its output layer.

RL frameworks replace `output_layer` by a linear `[labels, hidden]`, with a bias or without, that every tensor-parallel
rank has whole: `LinearForLastLayer` of verl, slime, mbridge and Megatron-Bridge, `OutputLayerLinear` of ms-swift.
transformers calls it `score`, and has two classes for most families:

    …ForSequenceClassification   no bias; the value of the last token that is not padding: a reward model
    …ForTokenClassification      with a bias, unless config.json says `token_classification_bias=false`; a value for
                                 each token: a critic

Both compute a token's value from the same hidden state, so either class can hold a head without a bias.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from amaxbridge.mappings.families import decoder
from amaxbridge.mappings.family import ModelFamily, Source, Translation
from amaxbridge.mappings.weights import HeadMapping

SCORE = "score"
"""The head's module in files."""
SEQUENCES, TOKENS = "ForSequenceClassification", "ForTokenClassification"
_LANGUAGE_MODEL = "ForCausalLM"
_WEIGHT, _BIAS = (HeadMapping(f"output_layer.{kind}", f"{SCORE}.{kind}") for kind in ("weight", "bias"))
_HEADS: Mapping[str, tuple[HeadMapping, ...]] = MappingProxyType({SEQUENCES: (_WEIGHT,), TOKENS: (_WEIGHT, _BIAS)})
_OF_LANGUAGE_MODELS = ("final_logit_softcapping", "mtp_num_layers")
"""Settings of what follows an output layer, and of layers that predict further tokens."""

_BOTH = (
    "Arcee", "DeepseekV3", "Exaone4", "Gemma2", "Glm", "Glm4", "GptOss", "Llama", "Ministral3", "Mistral", "Mixtral",
    "Phi3", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Qwen3Next", "SeedOss", "SmolLM3",
)  # fmt: skip
_SEQUENCES_ONLY = ("DeepseekV2", "Gemma3Text", "HunYuanDenseV1", "HunYuanMoEV1", "Olmo2", "Olmo3")
_NAMED_OTHERWISE = {"Gemma3ForCausalLM": "Gemma3Text"}  # its class without `Text` has a vision tower


def classifiers_of(family: ModelFamily) -> Iterator[ModelFamily]:
    """The family's models with a head in place of the output layer, for each class that transformers has of them."""
    for architecture in family.architectures:
        model = _NAMED_OTHERWISE.get(architecture, architecture.removesuffix(_LANGUAGE_MODEL))
        kinds = (SEQUENCES, TOKENS) if model in _BOTH else (SEQUENCES,) if model in _SEQUENCES_ONLY else ()
        for kind in kinds:
            yield replace(
                family,
                architectures=(model + kind,),
                mappings=(*(each for each in family.mappings if each is not decoder.OUTPUT), *_HEADS[kind]),
                transformer=_without(family.transformer),
                layers=_without(family.layers),
                exceptions=lambda hf_config: (),  # which all are of further tokens
                alike=(),
                classifier_of=architecture,
            )


def _without(table: Mapping[str, Source]) -> dict[str, Source]:
    """A table that reads None for settings that only language models have, and writes them as it did."""
    return {name: _unread(source) if name in _OF_LANGUAGE_MODELS else source for name, source in table.items()}


def _unread(source: Source) -> Translation:
    return Translation(
        lambda hf_config: None, (lambda settings: {source: None}) if isinstance(source, str) else source.write
    )
