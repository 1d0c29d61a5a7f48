"""HybridModel, Megatron's second model class: attention, MLP, experts and Mamba are layers of their own.

`hybrid_layer_pattern` has a letter for each layer, `|` between pipeline stages and `/` before each layer for
multi-token prediction (MTP), which is a pattern again. `*-*E/*E` is a dense layer, a sparse one and an MTP layer.
Letters and layout: megatron.core.models.hybrid.hybrid_layer_allocation.

Mappings use Hugging Face's layer numbers, so names are converted to them, in one of two ways:

- `transformer_name`: each Hugging Face decoder layer is two HybridModel layers; names become those of a GPTModel, and
  the norm of a Mamba layer is an input norm, too.

      decoder.layers.2.self_attention.linear_qkv.weight               decoder.layers.1.self_attention.linear_qkv.weight
      decoder.layers.3.mlp.linear_fc1.weight                          decoder.layers.1.mlp.linear_fc1.weight
      decoder.layers.4.norm.weight                                    decoder.layers.2.input_layernorm.weight
      mtp.layers.0.mtp_model_layer.layers.1.mlp.linear_fc1.weight     mtp.layers.0.mtp_model_layer.mlp.linear_fc1.weight

- `hybrid_name`: layers are the same on both sides (Nemotron-H), with one norm each; MTP layers are renumbered.

      decoder.layers.3.pre_mlp_layernorm.weight                       decoder.layers.3.norm.weight
      mtp.layers.1.mtp_model_layer.layers.0.input_layernorm.weight    mtp.layers.2.norm.weight
"""

import re
from collections.abc import Mapping
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from amaxbridge.mappings.canonical import canonical
from amaxbridge.mappings.errors import MappingError

MIXERS = "*+DGM"
"""Softmax attention, latent attention, sparse attention, gated delta net, Mamba."""
FEED_FORWARD = "-E"
"""MLP, mixture of experts."""

_LAYERS = re.compile(f"[{re.escape(MIXERS + FEED_FORWARD)}]*")
_TRANSFORMER = re.compile(f"([{re.escape(MIXERS)}][{FEED_FORWARD}]?)*")
_IN_TURN = re.compile(rf"([*G][{FEED_FORWARD}])+|(\+[{FEED_FORWARD}])+")

_DECODER_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_MTP_INNER_LAYER = re.compile(r"^mtp\.layers\.(\d+)\.mtp_model_layer\.layers\.(\d+)\.")
_MTP_OUTER_LAYER = re.compile(r"^mtp\.layers\.(\d+)\.(?=(enorm|hnorm|eh_proj|final_layernorm)\.)")
_MAMBA_NORM = re.compile(r"^(decoder\.layers\.\d+)\.norm\.")
_LAYER_NORM = re.compile(r"^((?:decoder|mtp)\.layers\.\d+)\.(?:input|pre_mlp)_layernorm\.")


class HybridPattern(NamedTuple):
    """The letters of a `hybrid_layer_pattern`.

    Args:
        decoder: a letter for each decoder layer, without the marks of pipeline stages.
        mtp: a letter for each layer inside an MTP layer, "" without MTP.
        depths: the number of MTP layers.
    """

    decoder: str
    mtp: str
    depths: int


@cache
def read_pattern(text: str) -> HybridPattern:
    """Parses a `hybrid_layer_pattern`.

    Raises:
        MappingError: an unknown letter, or MTP layers that differ.
    """
    decoder, *mtp = text.replace("|", "").split("/")
    if not _LAYERS.fullmatch(decoder + "".join(mtp)):
        raise MappingError(f"hybrid_layer_pattern {text!r}: layers are the letters {MIXERS}{FEED_FORWARD}")
    if len(set(mtp)) > 1:
        raise MappingError(f"hybrid_layer_pattern {text!r}: all MTP layers must be the same")
    return HybridPattern(decoder, mtp[0] if mtp else "", len(mtp))


def once(text: str) -> str:
    """The pattern with a single MTP layer, for a model that repeats one layer at every depth."""
    return "/".join(text.split("/")[:2])


def transformer_pattern(config: Mapping[str, Any]) -> str:
    """The pattern of a transformer: attention, alternating with MLP or experts.

    Args:
        config: fields of Megatron's TransformerConfig; `moe_layer_freq` and `linear_attention_freq` as lists, or absent
            if all layers are alike.
    """
    attention = "+" if config.get("multi_latent_attention") else "*"
    alike = [bool(config.get("num_moe_experts"))] * config["num_layers"]
    linear = config.get("linear_attention_freq") or [0] * config["num_layers"]
    layers = [
        ("G" if delta else attention) + ("E" if sparse else "-")
        for delta, sparse in zip(linear, config.get("moe_layer_freq", alike), strict=True)
    ]
    return "/".join(["".join(layers), *layers[-1:] * (config.get("mtp_num_layers") or 0)])


def transformer_settings(text: str) -> dict[str, Any]:
    """The inverse of `transformer_pattern`: fields of Megatron's TransformerConfig.

    Raises:
        MappingError: the pattern is not that of a transformer.
    """
    layers = read_pattern(text)
    if not _IN_TURN.fullmatch(layers.decoder):
        raise MappingError(f"hybrid_layer_pattern {text!r}: attention must alternate with MLP or experts")
    delta = "G" in layers.decoder
    return {
        "experimental_attention_variant": "gated_delta_net" if delta else None,
        "linear_attention_freq": [int(letter == "G") for letter in layers.decoder[::2]] if delta else None,
        "num_layers": len(layers.decoder) // 2,
        "moe_layer_freq": [int(letter == "E") for letter in layers.decoder[1::2]],
        "multi_latent_attention": layers.decoder[0] == "+",
        "mtp_num_layers": layers.depths or None,
    }


def with_stages(text: str, stages: int) -> str:
    """The pattern with its decoder layers divided by `|` between pipeline stages, as evenly as possible."""
    decoder, *mtp = text.replace("|", "").split("/")
    ends = [len(decoder) * stage // stages for stage in range(stages + 1)]
    return "/".join(["|".join(decoder[start:end] for start, end in pairwise(ends)), *mtp])


def transformer_name(megatron_name: str, pattern: str) -> str:
    """The canonical name of a HybridModel's parameter or quantizer, for layers that pair up into decoder layers.

    Args:
        megatron_name: global, in any spelling.
        pattern: the model's `hybrid_layer_pattern`.

    Raises:
        MappingError: the pattern is not that of a transformer, or has no such layer.
    """
    layers = read_pattern(pattern)
    name = _DECODER_LAYER.sub(
        lambda found: f"decoder.layers.{_decoder_layer(int(found[1]), layers.decoder, megatron_name)}.",
        canonical(megatron_name),
    )
    inner = _MTP_INNER_LAYER.match(name)
    if inner and _decoder_layer(int(inner[2]), layers.mtp, megatron_name):
        raise MappingError(f"{megatron_name}: the MTP layer {layers.mtp!r} is more than one layer of a transformer")
    name = _MAMBA_NORM.sub(r"\1.input_layernorm.", name)
    return _MTP_INNER_LAYER.sub(r"mtp.layers.\1.mtp_model_layer.", name)


def hybrid_name(megatron_name: str, pattern: str) -> str:
    """The canonical name of a HybridModel's parameter or quantizer, for layers that Hugging Face has too.

    The modules around the layers inside an MTP layer belong to the first of them, its final norm to the last.

    Args:
        megatron_name: global, in any spelling.
        pattern: the model's `hybrid_layer_pattern`.
    """
    count = len(read_pattern(pattern).mtp)
    name = canonical(megatron_name)
    name = _MTP_INNER_LAYER.sub(lambda found: f"mtp.layers.{int(found[1]) * count + int(found[2])}.", name)
    name = _MTP_OUTER_LAYER.sub(lambda found: _outer_layer(int(found[1]), found[2], count), name)
    return _LAYER_NORM.sub(r"\1.norm.", name)


def _outer_layer(depth: int, module: str, count: int) -> str:
    inner = count - 1 if module == "final_layernorm" else 0
    return f"mtp.layers.{depth * count + inner}."


def _decoder_layer(layer: int, letters: str, name: str) -> int:
    numbers = _decoder_layers(letters)
    if layer >= len(numbers):
        raise MappingError(f"{name}: no such layer in the hybrid_layer_pattern {letters!r}")
    return numbers[layer]


@cache
def _decoder_layers(letters: str) -> tuple[int, ...]:
    """The decoder layer of each HybridModel layer: a mixer begins one, a feed-forward layer ends it."""
    if not _TRANSFORMER.fullmatch(letters):
        raise MappingError(f"hybrid_layer_pattern {letters!r}: MLP or experts must follow attention or Mamba")
    return tuple(mixers - 1 for mixers in accumulate(letter in MIXERS for letter in letters))
