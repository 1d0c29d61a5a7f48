"""What `repair` makes of each way to break a checkpoint (`verify_breaks`), and more ways of its own."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from amaxbridge.export.schemes import SCHEMES
from amaxbridge.export.schemes.scheme import quantize_tensors
from amaxbridge.mappings.fused_groups import groups_among
from tests.support.checkpoints import tensors_in
from tests.support.checkpoints_to_verify import INDEX, Made
from tests.support.verify_breaks import (
    BREAKS,
    DOWN_INPUT,
    DOWN_SCALE,
    EXPERT,
    GATE,
    GROUP,
    INF,
    LAYER,
    MOE,
    NAN,
    Q_GLOBAL,
    Q_INPUT,
    UP,
    Break,
    Q,
    at,
    both,
    configure,
    drop,
    edit_index,
    fill,
    ignore,
    invert,
    invert_all,
    put,
    targets,
)

SIXTY_FOUR = 64  # outputs of down_proj
V_GLOBAL, V_INPUT = (f"{LAYER}.self_attn.v_proj.{each}" for each in ("weight_global_scale", "input_global_scale"))


def reshape(name: str, *shape: int) -> Callable[[Made], object]:
    return lambda made: made.tensors.update({name: made.tensors[name].reshape(shape)})


def convert(name: str, dtype: torch.dtype) -> Callable[[Made], object]:
    return lambda made: made.tensors.update({name: made.tensors[name].to(dtype)})


def rename_cache_scales(pattern: str) -> Callable[[Made], object]:
    """`k_scale` and `v_scale` under other names."""

    def change(made: Made) -> None:
        for name in [each for each in made.tensors if each.endswith((".k_scale", ".v_scale"))]:
            made.tensors[f"{name[:-7]}{pattern.format(name[-7])}"] = made.tensors.pop(name)

    return change


def spoil(file: Path) -> None:
    file.write_text(file.read_text()[:-9])


def lose(directory: Path, *names: str) -> None:
    """Removes a file of tensors, and others."""
    for name in ("model-00002-of-00004.safetensors", *names):
        (directory / name).unlink()


def index_of_the_source(directory: Path) -> None:
    """The index is that of the model before it was quantized: other names, in files that are not there."""
    path = directory / INDEX
    names = [name for name in json.loads(path.read_text())["weight_map"] if "_scale" not in name]
    weights = [name.replace(".weight_packed", ".weight") for name in names]
    index = {
        "metadata": {"total_size": 1, "by": "hand"},
        "weight_map": dict.fromkeys(weights, "model-1-of-1.safetensors"),
    }
    path.write_text(json.dumps(index))


def mix_up(index: Any) -> None:
    files = sorted(set(index["weight_map"].values()))
    for number, name in enumerate(index["weight_map"]):
        index["weight_map"][name] = files[number % len(files)]


def copy_file(directory: Path) -> None:
    """A file twice, under another name."""
    file = sorted(directory.glob("*.safetensors"))[0]
    (directory / "old.safetensors").write_bytes(file.read_bytes())


def copy_file_without_index(directory: Path) -> None:
    copy_file(directory)
    (directory / INDEX).unlink()


def several_groups(made: Made) -> None:
    """Two groups by name, of which the second forgets a module that no other targets."""
    first = made.group
    made.quantization["config_groups"] = {
        "group_0": {**first, "targets": [r"re:.*self_attn\..*_proj$"]},
        "group_1": {**first, "targets": [r"re:.*(gate|up)_proj$"], "weights": {**first["weights"], "num_bits": 8}},
    }


def share_nothing(made: Made, ratio: Mapping[str, float] | None = None) -> None:
    """Quantizes every member of a fused group with a global scale of its own, as tools without fused groups do.

    Args:
        made: a checkpoint in a scheme whose fused groups share a scale.
        ratio: last part of a module's name → what its weights are multiplied by before.
    """
    scheme = SCHEMES["nvfp4a16"]
    weights = tensors_in(made.reference)
    modules = [name.removesuffix(".weight_packed") for name in made.tensors if name.endswith(".weight_packed")]
    for module in (name for group in groups_among(modules) if len(group.members) > 1 for name in group.members):
        weight = weights[f"{module}.weight"] * (ratio or {}).get(module.rpartition(".")[2], 1.0)
        made.tensors |= dict(quantize_tensors(scheme, {module: weight}))


OWN: dict[str, Break] = {
    "the index of the source": Break("index", "model.", damage=index_of_the_source),
    "an index that mixes up files": Break("index", "model.", damage=edit_index(mix_up)),
    "an index that is no JSON": Break("index", INDEX, damage=lambda directory: spoil(directory / INDEX)),
    "no index, and a file that is gone": Break("index", INDEX, damage=lambda directory: lose(directory, INDEX)),
    "an index that is no JSON, and a file that is gone": Break(
        "index", INDEX, damage=lambda directory: [spoil(directory / INDEX), lose(directory)]
    ),
    "a file twice": Break("duplicates", "model.", damage=copy_file),
    "a file twice, and no index": Break("duplicates", "model.", damage=copy_file_without_index),
    "a scale with another dim": Break("contract", Q_GLOBAL, reshape(Q_GLOBAL, 1, 1)),
    "a scale without any dim": Break("contract", Q_GLOBAL, reshape(Q_GLOBAL)),
    "a scale in fp64": Break("contract", Q_GLOBAL, convert(Q_GLOBAL, torch.float64)),
    "a scale of v upside down": Break("weight-divisors", V_GLOBAL, invert(V_GLOBAL)),
    "input scales of q upside down": Break("input-divisors", Q_INPUT, invert(Q_INPUT)),
    "all input scales upside down, one for each expert": Break(
        "input-divisors", DOWN_INPUT.replace("mlp.", "mlp.experts.0."), invert_all("input_global_scale"), model=MOE
    ),
    "q has no input scale": Break("input-scales", Q_INPUT, drop(Q_INPUT)),
    "v has an infinite input scale": Break("usable-input-scales", V_INPUT, fill(V_INPUT, INF)),
    "an expert's gate has NaN for an input scale": Break(
        "expert-input-scales",
        f"{EXPERT}.gate_proj.input_global_scale",
        fill(f"{EXPERT}.gate_proj.input_global_scale", NAN),
        model=MOE,
    ),
    "an unknown key that says nothing": Break(
        "config-keys", "group_0.weights.observer_of_tomorrow", configure(f"{GROUP}.weights.observer_of_tomorrow", None)
    ),
    "quantization_config in text_config": Break(
        "quantization-config",
        "quantization_config",
        lambda made: made.config.update(text_config={"quantization_config": made.config.pop("quantization_config")}),
    ),
    "scales of rows without the second dim": at("contract", DOWN_SCALE, reshape, SIXTY_FOUR, scheme="fp8_dynamic"),
    "older names of the cache's scales": Break(
        "kv-scales", f"{LAYER}.self_attn.k_scale", rename_cache_scales("{}_proj.output_scale"), cache=True
    ),
    "other names of the cache's scales": Break(
        "leftovers", f"{LAYER}.self_attn.k_cache_scale", rename_cache_scales("{}_cache_scale"), cache=True
    ),
    "a key of some versions, and no other of them": Break(
        "version-gate",
        "group_0.weights.zp_dtype",
        configure(f"{GROUP}.weights.zp_dtype", "torch.int8"),
        scheme="nvfp4a16",
    ),
    "ModelOpt's name for it": Break("quantized-is-targeted", Q, configure("quant_method", "modelopt")),
    "everything is ignored": Break("quantized-is-targeted", Q, ignore("lm_head", "re:.*")),
    "targets that match nothing": Break("quantized-is-targeted", Q, targets(r"re:transformer\..*_proj$")),
    "a class that is no linear": Break("quantized-is-targeted", Q, targets("Conv2d")),
    "several things at once": Break(
        "fused-input-scales",
        Q_INPUT,
        both(
            put(Q_INPUT, torch.tensor([100.0])),
            ignore(),
            configure(f"{GROUP}.format", "pack-quantized"),
            fill(f"{GATE}.input_global_scale", 0),
            put(f"{UP}.weight_quantizer._amax", torch.ones(1)),
        ),
        damage=lambda directory: (directory / INDEX).unlink(),
    ),
}

GONE = ("no index, and a file that is gone", "an index that is no JSON, and a file that is gone")
SAME = (
    "no index", "a tensor in the index only", "a tensor in a header only", "a tensor in two files",
    "a wrong total size", "quantization_config under its old name", "another method", "ModelOpt's file beside it",
    "a group with a name of its own", "a format of another", "a global format of another",
    "a class and a name",
    "no regular expression", "input scales of weights only", "scales as bytes", "a quantizer's buffer",
    "another format's scale", "a cache without its scheme", "a part of a fused layer is ignored",
    "ignored by the end of a name", "quantized and ignored", "a pattern without an end", "targeted by no group",
    "a head", "a router", "neither targeted nor ignored", "two groups for a module",
    "a pattern for routers that hits experts", "a class in ignore", "a reciprocal", "reciprocals of all inputs",
    "a wrong weight_shape",
    *(way for way in OWN if way not in ("several things at once", *GONE)),
)  # fmt: skip
"""After these, every tensor is the good checkpoint's again, bit for bit."""

OTHERWISE = (
    "a tied head", "a vision tower", "q, k, v differ", "gate and up of an expert differ", "static FP8 differs",
    "inputs differ", "an uncalibrated expert", "right by itself, wrong after the merge", "a scale without a dim",
    "packed experts that nobody mentions", "several things at once",
)  # fmt: skip
"""After these, the checkpoint serves, with tensors that differ from the good one's, or with more tensors."""

REFUSED = (
    "no index, and a file that is gone", "an index that is no JSON, and a file that is gone",
    "a truncated file", "overlapping tensors", "no config.json", "a file that is gone", "no quantization_config",
    "an unknown key", "no layer", "an expert is gone", "the last experts are gone", "an expert's scale is gone",
    "an expert along the wrong side", "a weight of no architecture", "stacked scales", "codes are gone",
    "all input scales are gone", "scales of padded columns", "zero points of no format", "a cache's scale is gone",
    "several scales of a cache with one",
    "a pattern that hits the fused name", "a group quantized in part", "a global scale of 0", "a global scale of -1",
    "a global scale of nan", "a global scale of inf", "a block scale of 0", "a block scale of -1",
    "a block scale of nan", "NaN in E8M0", "Inf in a row's scale", "an input scale of zero", "reciprocals of rows",
    "a reciprocal of one input", "a shard's scale is gone", "experts that vLLM skips",
    "experts that transformers reinitialises", "experts under names that transformers does not merge",
    "blocks that are wider than the layer",
)  # fmt: skip
"""Nothing in these checkpoints says what would be right, so nothing is written."""

NOT_OURS = (
    "no tokenizer", "a key of some versions", "an unknown scheme", "no layers for prediction",
    "an architecture that is not known",
    "a layer that Marlin has no tile for", "an expert far off", "an amax far above the weights",
    "an indexer that vLLM builds in 16 bits", "an indexer that SGLang builds in 16 bits",
    "a mixer that vLLM builds in 16 bits", "a group of an architecture's own, quantized in part",
    "int8 experts in SGLang", "MXFP4 in SGLang", "NVFP4 experts in transformers", "zero points in transformers",
    "no norm", "one tensor more", "another shape", "swapped nibbles", "weights of another layer",
    "an amax below the weights", "another amax than training's", "heads that do not divide",
    "experts that do not divide", "a cache with scales for each head, for SGLang",
    "a head with a bias of SGLang's own",
)  # fmt: skip
"""Warnings, engines that do not serve them, and what a reference alone shows."""

WAYS: Mapping[str, Break] = BREAKS | OWN
