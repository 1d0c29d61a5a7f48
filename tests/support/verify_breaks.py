"""A table of ways to break a good checkpoint, and the few changes that they are made of."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.checkpoints_to_verify import INDEX, TOKENIZER, Made, fused

LAYER = "model.layers.1"
Q, GATE, UP, DOWN = (
    f"{LAYER}.{each}" for each in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
)
EXPERT = f"{LAYER}.mlp.experts.3"
DENSE, MOE = "qwen3", "qwen3_moe"


@dataclass(frozen=True)
class Break:
    """One way to break a checkpoint.

    Args:
        rule: what must find it.
        subject: what must be named.
        change: of tensors and config.json, before they are written.
        damage: of the files, after they are written.
        reference: verify against what it was made from; `state`: against the amax it was made with.
        engine: the engine that must not serve it, where others may.
    """

    rule: str
    subject: str
    change: Callable[[Made], object] = lambda made: None
    damage: Callable[[Path], object] = lambda directory: None
    model: str = DENSE
    scheme: str = "nvfp4"
    cache: bool = False
    reference: str = ""
    tp: int = 1
    ep: int = 1
    engine: str = ""


def at(rule: str, tensor: str, change: Callable[..., Callable[[Made], object]], *values: Any, **how: Any) -> Break:
    """A break of one tensor: `change(tensor, *values)`, which the rule names."""
    return Break(rule, tensor, change(tensor, *values), **how)


def drop(*names: str) -> Callable[[Made], object]:
    return lambda made: [made.tensors.pop(name) for name in names]


def per_head(made: Made) -> None:
    """Scales of the key-value cache for each head, as compressed-tensors has them."""
    made.quantization["kv_cache_scheme"]["strategy"] = "attn_head"
    heads = made.config["num_key_value_heads"]
    for name in made.tensors:
        if name.endswith(("k_scale", "v_scale")):
            made.tensors[name] = made.tensors[name].expand(heads)[:, None, None].contiguous()


def drop_all(part: str) -> Callable[[Made], object]:
    return lambda made: drop(*[name for name in made.tensors if part in name])(made)


def put(name: str, tensor: torch.Tensor) -> Callable[[Made], object]:
    return lambda made: made.tensors.update({name: tensor})


def scale(name: str, factor: float) -> Callable[[Made], object]:
    return lambda made: made.tensors.update({name: made.tensors[name] * factor})


def invert(*names: str) -> Callable[[Made], object]:
    return lambda made: made.tensors.update({name: 1 / made.tensors[name].float() for name in names})


def cast(name: str, dtype: torch.dtype) -> Callable[[Made], object]:
    return lambda made: made.tensors.update({name: made.tensors[name].view(dtype)})


def fill(name: str, value: float) -> Callable[[Made], object]:
    """A copy that is filled with one number."""

    def change(made: Made) -> None:
        changed = made.tensors[name].clone()
        changed.view(-1)[0] = value
        made.tensors[name] = changed

    return change


def configure(path: str, value: Any) -> Callable[[Made], object]:
    """Sets a key of `quantization_config`; dots go into dictionaries."""

    def change(made: Made) -> None:
        *parents, last = path.split(".")
        found: Any = made.quantization
        for key in parents:
            found = found[key]
        found[last] = value

    return change


def both(*changes: Callable[[Made], object]) -> Callable[[Made], object]:
    return lambda made: [change(made) for change in changes]


def targets(*names: str) -> Callable[[Made], object]:
    return configure("config_groups.group_0.targets", list(names))


def ignore(*entries: str) -> Callable[[Made], object]:
    return configure("ignore", list(entries))


def ignore_too(*entries: str) -> Callable[[Made], object]:
    return lambda made: made.quantization["ignore"].extend(entries)


def copy_module(module: str, to: str) -> Callable[[Made], object]:
    """Copies a module to another name."""

    def change(made: Made) -> None:
        parts = {name: tensor for name, tensor in made.tensors.items() if name.startswith(f"{module}.")}
        made.tensors.update({to + name.removeprefix(module): tensor.clone() for name, tensor in parts.items()})

    return change


def invert_all(part: str) -> Callable[[Made], object]:
    return lambda made: invert(*[name for name in made.tensors if part in name])(made)


def say(**entries: Any) -> Callable[[Made], object]:
    """Sets entries of config.json."""
    return lambda made: made.config.update(entries)


def plain(module: str, *shape: int) -> Callable[[Made], object]:
    """Puts a weight in 16 bits in place of codes and scales."""

    def change(made: Made) -> None:
        drop_all(f"{module}.")(made)
        made.tensors[f"{module}.weight"] = torch.ones(shape, dtype=torch.bfloat16)

    return change


def turn_experts(made: Made) -> None:
    """The model has other sizes than the files: experts are [hidden, ffn] in place of [ffn, hidden]."""
    made.config["moe_intermediate_size"], made.config["hidden_size"] = 64, 32


def rename_group(made: Made) -> None:
    made.quantization["config_groups"] = {"mlp": made.group}


def overlapping_groups(made: Made) -> None:
    first = made.group
    groups = {"group_0": {**first, "targets": [r"re:.*_proj$"]}, "group_1": {**first, "targets": [r"re:.*down_proj$"]}}
    made.quantization["config_groups"] = groups


def take_other_layer(name: str) -> Callable[[Made], object]:
    return lambda made: made.tensors.update({name: made.tensors[name.replace("layers.1", "layers.0")]})


def halve_scales(name: str) -> Callable[[Made], object]:
    """Global and block scales of a module: by itself, it dequantizes to the same."""

    def change(made: Made) -> None:
        made.tensors[f"{name}_global_scale"] = made.tensors[f"{name}_global_scale"] / 2
        blocks = made.tensors[f"{name}_scale"].float() / 2
        made.tensors[f"{name}_scale"] = blocks.to(torch.float8_e4m3fn)

    return change


def swap_nibbles(name: str) -> Callable[[Made], object]:
    return lambda made: made.tensors.update({name: (made.tensors[name] << 4) | (made.tensors[name] >> 4)})


def stack_experts(made: Made) -> None:
    names = [f"{LAYER}.mlp.experts.{expert}.gate_proj.weight_global_scale" for expert in range(8)]
    made.tensors[f"{LAYER}.mlp.experts.gate_up_proj_weight_global_scale"] = torch.cat(
        [made.tensors.pop(name) for name in names]
    )


def truncate(directory: Path) -> None:
    file = sorted(directory.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-8])


def overlap(directory: Path) -> None:
    """Makes two tensors of a file overlap."""
    file = sorted(directory.glob("*.safetensors"))[1]
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    file.write_bytes(data[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + data[8 + length :])


def beside_modelopt(directory: Path) -> None:
    (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))


def remove(pattern: str) -> Callable[[Path], object]:
    return lambda directory: sorted(directory.glob(pattern))[-1].unlink()


def edit_index(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index)
        (directory / INDEX).write_text(json.dumps(index))

    return damage


def ghost(index: Any) -> None:
    index["weight_map"]["ghost"] = index["weight_map"]["model.norm.weight"]


def forget(index: Any) -> None:
    del index["weight_map"]["model.norm.weight"]


def miscount(index: Any) -> None:
    index["metadata"]["total_size"] += 1


def twice(directory: Path) -> None:
    save_file({"model.norm.weight": torch.ones(64)}, directory / "more.safetensors")


NAN, INF = float("nan"), float("inf")
GROUP = "config_groups.group_0"
Q_SCALE, Q_GLOBAL, Q_INPUT = (f"{Q}.{each}" for each in ("weight_scale", "weight_global_scale", "input_global_scale"))
DOWN_SCALE, DOWN_GLOBAL = f"{DOWN}.weight_scale", f"{DOWN}.weight_global_scale"
DOWN_INPUT = f"{DOWN}.input_global_scale"
EXPERT_INPUT = f"{EXPERT}.down_proj.input_global_scale"
TINY_SCALES = torch.full((64, 6), 0.5).to(torch.float8_e4m3fn)

FILES = {
    "a truncated file": Break("headers", "model-00001-of-", damage=truncate),
    "overlapping tensors": Break("headers", "model-00002-of-", damage=overlap),
    "no config.json": Break("config", "config.json", damage=remove("config.json")),
    "no index": Break("index", INDEX, damage=remove(INDEX)),
    "a tensor in the index only": Break("index", "ghost", damage=edit_index(ghost)),
    "a tensor in a header only": Break("index", "model.norm.weight", damage=edit_index(forget)),
    "a file that is gone": Break("index", "model-0000", damage=remove("*.safetensors")),
    "a tensor in two files": Break("duplicates", "model.norm.weight", damage=twice),
    "no tokenizer": Break("tokenizer", "tokenizer", damage=lambda directory: (directory / TOKENIZER).unlink()),
    "a wrong total size": Break("total-size", INDEX, damage=edit_index(miscount)),
}

CONFIG = {
    "quantization_config under its old name": Break(
        "quantization-config",
        "quantization_config",
        lambda made: made.config.update(compression_config=made.config.pop("quantization_config")),
    ),
    "no quantization_config": Break(
        "quantization-config", "quantization_config", lambda made: made.config.pop("quantization_config")
    ),
    "another method": at("quantization-config", "quant_method", configure, "gptq"),
    "ModelOpt's file beside it": Break("two-configs", "hf_quant_config.json", damage=beside_modelopt),
    "an unknown key": Break("config-keys", "group_0.weights.zero", configure(f"{GROUP}.weights.zero", 0)),
    "a key of some versions": Break(
        "version-gate", "group_0.weights.zp_dtype", configure(f"{GROUP}.weights.zp_dtype", "torch.int8")
    ),
    "a group with a name of its own": Break("group-names", "config_groups.mlp", rename_group),
    "a format of another": Break("formats", "group_0.format", configure(f"{GROUP}.format", "pack-quantized")),
    "a global format of another": at("formats", "format", configure, "float-quantized"),
    "an unknown scheme": Break("known-schemes", GROUP, configure(f"{GROUP}.weights.num_bits", 3)),
    "a class and a name": Break("mixed-targets", "group_0: re:.*mlp", targets("Linear", "re:.*mlp")),
    "no regular expression": Break("patterns", "ignore: re:(", ignore("lm_head", "re:(")),
}

NAMES = {
    "no norm": at("expected-names", f"{LAYER}.self_attn.q_norm.weight", drop, reference="weights"),
    "one tensor more": at("expected-names", "model.more.weight", put, torch.ones(4), reference="weights"),
    "another shape": at("expected-names", "model.norm.weight", put, torch.ones(32), reference="weights"),
    "no layer": at("layers", LAYER, drop_all),
    "no layers for prediction": Break("mtp", "num_nextn_predict_layers", say(num_nextn_predict_layers=1)),
    "an expert is gone": at("experts", EXPERT, drop_all, model=MOE),
    "the last experts are gone": Break("experts", f"{LAYER}.mlp.experts.7", drop_all(".experts.7."), model=MOE),
    "an expert's scale is gone": at("experts", f"{EXPERT}.up_proj.weight_scale", drop, model=MOE),
    "an architecture that is not known": Break("known-architecture", "architectures", say(architectures=["Unheard"])),
    "an expert along the wrong side": Break("shapes", f"{EXPERT}.down_proj.weight", turn_experts, model=MOE),
    "packed experts that nobody mentions": Break(
        "accounted",
        f"{LAYER}.mlp.experts.gate_up_proj",
        put(f"{LAYER}.mlp.experts.gate_up_proj", torch.ones(8, 128, 64)),
        model=MOE,
    ),
    "a weight of no architecture": at("accounted", f"{LAYER}.mlp.more.weight", put, torch.ones(2, 3, 4)),
    "stacked scales": Break(
        "stacked-experts", f"{LAYER}.mlp.experts.gate_up_proj_weight_global_scale", stack_experts, model=MOE
    ),
    "a shard's scale is gone": at("suffixes", Q_GLOBAL, drop),
    "codes are gone": Break("suffixes", Q, drop(f"{Q}.weight_packed")),
    "all input scales are gone": Break("input-scales", Q_INPUT, drop_all("input_global_scale")),
    "input scales of weights only": at("input-scales", Q_INPUT, put, torch.ones(1), scheme="nvfp4a16"),
    "scales as bytes": at("contract", Q_SCALE, cast, torch.uint8),
    "scales of padded columns": at("contract", Q_SCALE, put, torch.ones(128, 8).to(torch.float8_e4m3fn)),
    "a scale without a dim": at("contract", Q_GLOBAL, put, torch.tensor(9e3)),
    "a quantizer's buffer": at("leftovers", f"{Q}.weight_quantizer._amax", put, torch.ones(1)),
    "another format's scale": at("leftovers", f"{Q}.weight_scale_2", put, torch.ones(1)),
    "zero points of no format": at("leftovers", f"{Q}.weight_zero_point", put, torch.ones(1)),
    "a cache's scale is gone": at("kv-scales", f"{LAYER}.self_attn.v_scale", drop, cache=True),
    "a cache without its scheme": Break(
        "kv-scales", f"{LAYER}.self_attn.k_scale", lambda made: made.quantization.pop("kv_cache_scheme"), cache=True
    ),
    "several scales of a cache with one": at(
        "kv-scales", f"{LAYER}.self_attn.k_scale", put, torch.ones(3, 1, 1), cache=True
    ),
    "a head with a bias of SGLang's own": Break(
        "engine-heads",
        "architectures",
        both(
            say(architectures=["Qwen3ForSequenceClassification"], id2label={"0": "LABEL_0"}),
            both(drop("lm_head.weight"), both(put("score.weight", torch.ones(1, 64)), ignore("score"))),
        ),
    ),
    "a cache with scales for each head, for SGLang": Break("engine-cache", "kv_cache_scheme", per_head, cache=True),
}

MATCHING = {
    "a part of a fused layer is ignored": Break("unanimous", f"{LAYER}.mlp.gate_up_proj", ignore("lm_head", GATE)),
    "ignored by the end of a name": Break(  # by SGLang alone, which knows what Qwen3-MoE fuses
        "unanimous", f"{LAYER}.self_attn.qkv_proj", ignore_too("q_proj"), model=MOE, engine="sglang"
    ),
    "quantized and ignored": Break("quantized-is-targeted", DOWN, ignore("lm_head", r"re:.*down_proj$")),
    "a pattern without an end": Break("quantized-is-targeted", DOWN, ignore("lm_head", r"re:model\.layers\.1")),
    "targeted by no group": Break(
        "quantized-is-targeted", DOWN, targets(r"re:.*self_attn\..*", r"re:.*(gate|up)_proj$")
    ),
    "a head": Break("plain-is-ignored", "lm_head", ignore()),
    "a tied head": Break(
        "plain-is-ignored", "lm_head", both(ignore(), drop("lm_head.weight"), say(tie_word_embeddings=True))
    ),
    "a router": Break("plain-is-ignored", f"{LAYER}.mlp.gate", ignore("lm_head"), model=MOE),
    "a vision tower": at("plain-is-ignored", "visual.blocks.0.mlp.fc1", plain, 64, 64),
    "a pattern that hits the fused name": Break(
        "plain-is-ignored",
        GATE,
        both(plain(GATE, 96, 64), targets(r"re:.*self_attn\..*", "re:.*up_proj$", "re:.*down_proj$")),
    ),
    "neither targeted nor ignored": Break(
        "targeted-or-ignored", f"{LAYER}.mlp.gate", both(ignore("lm_head"), targets(r"re:.*_proj$")), model=MOE
    ),
    "two groups for a module": Break("one-group", DOWN, overlapping_groups),
    "a pattern for routers that hits experts": Break(
        "router-patterns", "ignore: re:.*gate.*", ignore("lm_head", "re:.*gate.*"), model=MOE
    ),
}

FUSED = {
    "a group quantized in part": Break("fused-formats", GATE, plain(UP, 96, 64)),
    "q, k, v differ": Break(
        "fused-weight-scales", Q_GLOBAL, scale(f"{LAYER}.self_attn.v_proj.weight_global_scale", 1 + 2**-22)
    ),
    "gate and up of an expert differ": at(
        "fused-weight-scales", f"{EXPERT}.gate_proj.weight_global_scale", scale, 2, model=MOE
    ),
    "static FP8 differs": at("fused-weight-scales", f"{GATE}.weight_scale", scale, 2, scheme="fp8"),
    "a layer that Marlin has no tile for": Break("marlin-tiles", "model.layers.0.mlp.gate_proj", scheme="w4a16"),
    "inputs differ": at("fused-input-scales", f"{GATE}.input_global_scale", scale, 1 + 2**-22),
}

SCALES = {
    **{
        f"a global scale of {value}": at("usable-weight-scales", DOWN_GLOBAL, fill, value)
        for value in (0, -1, NAN, INF)
    },
    **{f"a block scale of {value}": at("usable-weight-scales", DOWN_SCALE, fill, value) for value in (0, -1, NAN)},
    "NaN in E8M0": at("usable-weight-scales", DOWN_SCALE, fill, 255, scheme="mxfp4"),
    "Inf in a row's scale": at("usable-weight-scales", DOWN_SCALE, fill, INF, scheme="fp8_dynamic"),
    "an input scale of zero": at("usable-input-scales", DOWN_INPUT, fill, 0),
    "an uncalibrated expert": at("expert-input-scales", EXPERT_INPUT, fill, INF, model=MOE),
    "an expert far off": at("far-experts", EXPERT_INPUT, scale, 1e-4, model=MOE),
    "a reciprocal": Break(
        "weight-divisors", f"{GATE}.weight_global_scale", invert(*fused(GATE, "weight_global_scale"))
    ),
    "reciprocals of rows": at("weight-divisors", DOWN_SCALE, invert, scheme="w8a8"),
    "reciprocals of all inputs": Break("input-divisors", DOWN_INPUT, invert_all("input_global_scale")),
    "a reciprocal of one input": at("input-divisors", DOWN_INPUT, invert),
    "an amax far above the weights": at("unused-range", DOWN_SCALE, put, TINY_SCALES),
    "a wrong weight_shape": at("weight-shape", f"{DOWN}.weight_shape", put, torch.tensor([64, 95]), scheme="w4a16"),
}

REFERENCES = {
    "swapped nibbles": Break(
        "weight-error", f"{DOWN}.weight", swap_nibbles(f"{DOWN}.weight_packed"), reference="weights"
    ),
    "weights of another layer": Break(
        "weight-error", f"{DOWN}.weight", take_other_layer(f"{DOWN}.weight_packed"), reference="weights"
    ),
    "right by itself, wrong after the merge": Break(
        "weight-error", f"{UP}.weight", halve_scales(f"{UP}.weight"), reference="weights"
    ),
    "an amax below the weights": Break("saturation", f"{DOWN}.weight", scale(DOWN_GLOBAL, 4), reference="weights"),
    "another amax than training's": at("amax", DOWN_INPUT, scale, 1.01, reference="state"),
    "heads that do not divide": Break("parallel", "num_attention_heads", tp=8),
    "experts that do not divide": Break("parallel", "experts", model=MOE, ep=3),
}

GLM_DSA, JAMBA = "GlmMoeDsaForCausalLM", "JambaForCausalLM"
INDEXER = f"{LAYER}.self_attn.indexer"
ENGINES = {
    "experts that vLLM skips": Break(
        "experts-unread", EXPERT, say(architectures=["GptOssForCausalLM"]), model=MOE, engine="vllm"
    ),
    "experts that transformers reinitialises": Break(
        "experts-unread", EXPERT, say(architectures=["GptOssForCausalLM"]), model=MOE, engine="transformers"
    ),
    "experts under names that transformers does not merge": Break(
        "experts-unread", EXPERT, say(architectures=["MixtralForCausalLM"]), model=MOE, engine="transformers"
    ),
    "an indexer that vLLM builds in 16 bits": Break(
        "engine-builds",
        f"{INDEXER}.wk",
        both(copy_module(Q, f"{INDEXER}.wk"), say(architectures=[GLM_DSA])),
        engine="vllm",
    ),
    "an indexer that SGLang builds in 16 bits": Break(
        "engine-builds",
        f"{INDEXER}.weights_proj",
        both(copy_module(Q, f"{INDEXER}.weights_proj"), say(architectures=[GLM_DSA])),
        engine="sglang",
    ),
    "a mixer that vLLM builds in 16 bits": Break(
        "engine-builds",
        f"{LAYER}.mamba.in_proj",
        both(copy_module(Q, f"{LAYER}.mamba.in_proj"), say(architectures=[JAMBA])),
        engine="vllm",
    ),
    "a group of an architecture's own, quantized in part": Break(
        "engine-fuses",
        "transformer.h.0.mlp.gate_up_proj",
        both(
            copy_module(GATE, "transformer.h.0.mlp.c_fc_0"),
            plain("transformer.h.0.mlp.c_fc_1", 96, 64),
            say(architectures=["ExaoneForCausalLM"]),
        ),
        engine="vllm",
    ),
    "int8 experts in SGLang": Break(
        "engine-schemes", "model.layers.0.mlp.experts", scheme="w8a8", model=MOE, engine="sglang"
    ),
    "MXFP4 in SGLang": Break("engine-schemes", "model.layers.0", scheme="mxfp4", engine="sglang"),
    "NVFP4 experts in transformers": Break(
        "engine-schemes", "model.layers.0.mlp.experts", model=MOE, engine="transformers"
    ),
    "zero points in transformers": Break(
        "engine-schemes", "model.layers.0", scheme="w4a16_asym", engine="transformers"
    ),
    "a class in ignore": Break("quantized-is-targeted", DOWN, ignore("lm_head", "Linear"), engine="runtime"),
    "blocks that are wider than the layer": Break("fits", "model.layers.0", scheme="fp8_block", engine="vllm"),
}

BREAKS: dict[str, Break] = FILES | CONFIG | NAMES | MATCHING | FUSED | SCALES | REFERENCES | ENGINES
