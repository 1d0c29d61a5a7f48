"""Rules about names, shapes and dtypes: everything that the model needs is there, once, in its format.

What a model needs is known from two sources. config.json gives the number of layers and experts, and a module's config
group gives its tensors. A reference checkpoint, or the caller of `verify`, gives every name and shape (`expected`).
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator

from amaxbridge.export.amax.cache_scales import PER_HEAD, cache_format
from amaxbridge.export.architectures.facts import Role
from amaxbridge.export.schemes import MODELOPT_FORMAT
from amaxbridge.export.verify.checkpoint_view import INPUT_SCALES, QUANTIZED_SUFFIXES, CheckpointView, Module
from amaxbridge.export.verify.finding import Problem, Rule, Severity
from amaxbridge.mappings.model_config import number_of_experts
from amaxbridge.mappings.names import is_quantizer_state, is_routed_expert, module_of, natural_key

_LAYER = re.compile(r"((?:.*\.)?layers)\.(\d+)\.(.+)")
_EXPERTS = ".experts."
_NUMBERED = re.compile(r"(?:expert_)?(\d+)")
_OF_SCALES = ("_scale", "_scale_2", "_packed", "_zero_point")
_CACHE_SCALES = ("k_scale", "v_scale")
_FOREIGN = frozenset(  # what other programs, or earlier steps of an export, leave behind
    (
        "_amax", "_extra_state", "weight_scale_2", "weight_scale_inv", "output_scale", "k_cache_scale", "v_cache_scale",
        "weight_g_idx", "pre_quant_scale",
    )
)  # fmt: skip


def _expected(view: CheckpointView) -> Iterator[Problem]:
    if view.expected is None:
        return
    tied = {"lm_head.weight"} if view.text_config.get("tie_word_embeddings") else set[str]()
    quantized = {module.name for module in view.quantized}
    for name, shape in view.expected.items():
        module = view.modules.get(name.rpartition(".")[0])
        if name.endswith(".weight") and module is not None and module.is_quantized:
            if module.shape not in (shape, None):
                yield Problem(name, f"the model has {list(shape)}, the quantized weight {list(module.shape or ())}")
        elif name not in view.tensors:
            if name not in tied:
                yield Problem(name, f"is not there; the model has it, {list(shape)}")
        elif view.tensors[name].spec.shape != shape:
            yield Problem(name, f"has {list(view.tensors[name].spec.shape)}, the model {list(shape)}")
    for name in view.tensors:
        owner, _, suffix = name.rpartition(".")
        of_a_weight = owner in quantized and suffix in QUANTIZED_SUFFIXES and f"{owner}.weight" in view.expected
        if not of_a_weight and name not in view.expected and not _is_extra(view, name):
            yield Problem(name, "the model has no such tensor")


def _is_extra(view: CheckpointView, name: str) -> bool:
    """True for tensors that the model class lacks: cache scales, layers for multi-token prediction, a copied head."""
    return name.endswith(_CACHE_SCALES) or is_mtp(view, name) or name == "lm_head.weight"


def is_mtp(view: CheckpointView, name: str) -> bool:
    """True if a tensor belongs to a layer for multi-token prediction, which model classes leave out."""
    found, layers = _LAYER.fullmatch(name), view.text_config.get("num_hidden_layers")
    return name.startswith(("mtp.", "model.mtp.", "model.mtp_layers.")) or (
        found is not None and isinstance(layers, int) and found[1] == "model.layers" and int(found[2]) >= layers
    )


def _layers(view: CheckpointView) -> Iterator[Problem]:
    known = view.known_architecture
    stacks: dict[str, dict[int, set[str]]] = {}  # stack → layer → what lies in it
    for name in view.tensors:
        fact = None if known is None else known.fact(name)
        if fact is not None and fact.role is Role.TOWER:
            continue  # its lists may hold modules without weights
        if (found := _LAYER.match(name)) and "mtp" not in found[1]:
            stacks.setdefault(found[1], {}).setdefault(int(found[2]), set()).add(found[3].partition(".")[0])
    for stack, layers in stacks.items():
        is_main = stack in ("model.layers", "backbone.layers", "model.language_model.layers", "language_model.layers")
        wanted = _number_of_layers(view, set().union(*layers.values())) if is_main else None
        empty = _empty_layers(view) if is_main else set[int]()
        for numbered in _gaps({*layers, *empty}, max(layers) + 1 if wanted is None else wanted):
            yield Problem(f"{stack}.{numbered}", "has no tensors")


def _number_of_layers(view: CheckpointView, parts: Collection[str]) -> int | None:
    """The number of layers in config.json; None if it has none.

    Where config.json counts attention and MLP as layers of their own, files may still number both as one layer.
    """
    wanted, kinds = view.text_config.get("num_hidden_layers"), view.text_config.get("layer_types")
    if isinstance(kinds, list) and "mlp" in kinds and {"self_attn", "mlp"} <= set(parts):
        return len([kind for kind in kinds if kind != "mlp"])
    return wanted if isinstance(wanted, int) else None


def _empty_layers(view: CheckpointView) -> set[int]:
    """The layers that have neither attention nor MLP, where config.json describes each (`block_configs`)."""
    blocks = view.text_config.get("block_configs")
    return {
        number
        for number, block in enumerate(blocks if isinstance(blocks, list) else ())
        if isinstance(block, dict)
        and all(
            isinstance(part := block.get(name), dict) and part.get("no_op") is True for name in ("attention", "ffn")
        )
    }


def _gaps(numbers: Collection[int], count: int) -> Iterator[str]:
    """The numbers below `count` that are not there, several in a row as `3 to 9`: a name may say any number."""
    following = 0
    for number in sorted({*(number for number in numbers if number < count), count}):
        if number > following:
            yield str(following) if number == following + 1 else f"{following} to {number - 1}"
        following = number + 1


def _mtp(view: CheckpointView) -> Iterator[Problem]:
    wanted, layers = (view.text_config.get(key) for key in ("num_nextn_predict_layers", "num_hidden_layers"))
    if not isinstance(wanted, int) or not isinstance(layers, int):
        return
    found = {name for name in view.tensors if is_mtp(view, name)}
    numbers = {int(match[2]) for name in found if (match := _LAYER.fullmatch(name)) and match[1] == "model.layers"}
    if wanted and not found:
        yield Problem("num_nextn_predict_layers", f"config.json has {wanted}, and no tensor is of such a layer")
    elif numbers and numbers != set(range(layers, layers + wanted)):
        there = ", ".join(map(str, sorted(numbers)))
        yield Problem("num_nextn_predict_layers", f"config.json has {wanted} after {layers}, the files layers {there}")


def _experts(view: CheckpointView) -> Iterator[Problem]:
    """Each layer has as many experts as config.json says, and every expert has the same tensors.

    Where the architecture's files number more of one projection than the model routes to, the table says how many.
    """
    wanted = number_of_experts(view.text_config)
    known = view.known_architecture
    layers: dict[str, dict[int, set[str]]] = {}
    for name in view.tensors:
        layer, _, rest = name.partition(_EXPERTS)
        expert, _, part = rest.partition(".")
        if (found := _NUMBERED.fullmatch(expert)) is not None:
            layers.setdefault(f"{layer}.experts", {}).setdefault(int(found[1]), set()).add(part)
    for layer, experts in sorted(layers.items(), key=lambda item: natural_key(item[0])):
        parts = set().union(*experts.values())
        numbers = {
            part: None if known is None else known.number_of(f"{layer}.0.{module_of(part)}.weight") for part in parts
        }
        count = max((number or wanted or max(experts) + 1) for number in numbers.values())
        for numbered in _gaps(experts, count):
            yield Problem(f"{layer}.{numbered}", f"is not there; config.json has {count} experts")
        for number in sorted(number for number in experts if number >= count):
            yield Problem(f"{layer}.{number}", f"is one more than the {count} of config.json")
        everything = Counter(part for there in experts.values() for part in there)
        for number, there in experts.items():
            for part in sorted(everything.keys() - there):
                if number >= (numbers[part] or wanted or count):
                    continue  # of fewer experts than another projection
                yield Problem(f"{layer}.{number}.{part}", f"is not there; {everything[part]} other experts have it")


def _stacked(view: CheckpointView) -> Iterator[Problem]:
    for name, stored in view.tensors.items():
        rest = name.partition(_EXPERTS)[2]
        if rest.endswith(_OF_SCALES) and not _NUMBERED.fullmatch(rest.partition(".")[0]):
            yield Problem(name, f"{stored.spec} for all experts of the layer")


def _suffixes(view: CheckpointView) -> Iterator[Problem]:
    """A quantized module has every tensor of its scheme; input scales have a rule of their own."""
    for module in view.quantized:
        planned = view.planned(module)
        for suffix in planned.keys() - module.tensors.keys() - INPUT_SCALES.keys():
            yield Problem(f"{module.name}.{suffix}", f"is not there; {_named(module)} has it")
    for module in view.quantized:
        if not {"weight", "weight_packed"} & module.tensors.keys() or (module.scheme and module.shape is None):
            yield Problem(module.name, f"has no codes, only {', '.join(sorted(module.tensors))}")


def _inputs(view: CheckpointView) -> Iterator[Problem]:
    for module in view.quantized:
        planned = view.planned(module)
        for suffix in INPUT_SCALES if planned else ():
            name = f"{module.name}.{suffix}"
            if suffix in planned and suffix not in module.tensors:
                yield Problem(name, "is not there; config.json says that inputs have a static scale")
            elif suffix in module.tensors and suffix not in planned:
                yield Problem(name, f"is there; by config.json ({_named(module)}) inputs have no static scale")


def _contract(view: CheckpointView) -> Iterator[Problem]:
    for module in view.quantized:
        if misfit := view.misfit(module):
            yield Problem(module.name, misfit)
        for suffix, allowed in view.planned(module).items():
            stored = module.tensors.get(suffix)
            if stored is not None and stored.spec not in allowed:
                right = " or ".join(sorted(map(str, allowed)))
                yield Problem(f"{module.name}.{suffix}", f"is {stored.spec}, must be {right}")


def _leftovers(view: CheckpointView) -> Iterator[Problem]:
    in_projections = _CACHE_SCALES if view.quantization.method == MODELOPT_FORMAT else ()
    foreign = _FOREIGN - {suffix for module in view.quantized for suffix in view.planned(module)}
    for name in view.tensors:
        if is_quantizer_state(name) or name.rpartition(".")[2] in foreign:
            yield Problem(name, "is no tensor of the format")
    for module in view.quantized:
        planned = view.planned(module)
        others = module.tensors.keys() - planned.keys() - _FOREIGN - {"bias", *INPUT_SCALES, *in_projections}
        for suffix in others if planned else ():
            yield Problem(f"{module.name}.{suffix}", f"is no tensor of {_named(module)}")


def _cache(view: CheckpointView) -> Iterator[Problem]:
    wanted = view.quantization.raw.get("kv_cache_scheme") or view.quantization.kv_cache
    found = {name for name in view.tensors if name.endswith(tuple(f".{suffix}" for suffix in _CACHE_SCALES))}
    if not wanted:
        for name in sorted(found, key=natural_key):
            yield Problem(name, "is there; config.json says nothing of a quantized cache")
        return
    in_projections = view.quantization.method == MODELOPT_FORMAT
    count = _scales_of_a_layer(view)
    attentions = {name.rpartition(".")[0].removesuffix(f".{name[-7]}_proj") for name in found}
    attentions |= {name.rpartition(".")[0] for name in view.modules if name.endswith(".self_attn.k_proj")}
    for attention in sorted(attentions, key=natural_key):
        for suffix in _CACHE_SCALES:
            name = f"{attention}.{suffix[0]}_proj.{suffix}" if in_projections else f"{attention}.{suffix}"
            if name not in found and not is_mtp(view, name):
                yield Problem(name, "is not there; config.json has a kv_cache_scheme")
            elif name in found and math.prod(view.tensors[name].spec.shape) != count:
                yield Problem(name, f"is {view.tensors[name].spec}; kv_cache_scheme says {count} scales for each layer")


def _scales_of_a_layer(view: CheckpointView) -> int:
    """The number of scales that keys, and values, of one layer have."""
    heads = view.text_config.get("num_key_value_heads") or view.text_config.get("num_attention_heads")
    return heads if cache_format(view.quantization.kv_cache) is PER_HEAD and isinstance(heads, int) else 1


def _named(module: Module) -> str:
    assert module.scheme is not None
    return module.scheme.name


def is_expert(module: str) -> bool:
    """Whether a module is a routed expert's."""
    return is_routed_expert(f"{module}.")


RULES = (
    Rule(
        "expected-names",
        "every tensor of the model is there, quantized or not, with its shape, and no other",
        "vLLM loads what there is, and leaves the parameter of a missing tensor as memory was",
        "Export again; if the names are another architecture's, check config.json",
        _expected,
    ),
    Rule(
        "layers",
        "every layer that config.json counts is there",
        "the parameters of a missing layer are left as memory was",
        "Export again with all pipeline stages",
        _layers,
    ),
    Rule(
        "mtp",
        "layers for multi-token prediction are there, as many as config.json says",
        "serves without them; speculative decoding with them does not load, or drafts nonsense",
        "Export them, or set num_nextn_predict_layers to 0",
        _mtp,
        Severity.WARNING,
    ),
    Rule(
        "experts",
        "all experts of a layer are there, each with the same tensors",
        "loads in silence (tried with vLLM): tokens that are routed to the expert get nonsense",
        "Export again from all expert-parallel ranks",
        _experts,
    ),
    Rule(
        "stacked-experts",
        "scales and codes of experts are tensors of one expert each",
        "engines look for names with an expert's number and skip the stacked tensor",
        "Write a tensor for each expert",
        _stacked,
    ),
    Rule(
        "suffixes",
        "a quantized module has every tensor of its format",
        "loads in silence (tried with vLLM): the scale is what memory was",
        "Export again",
        _suffixes,
    ),
    Rule(
        "input-scales",
        "static input scales are there where config.json says so, and nowhere else",
        "missing: loads in silence, inputs are scaled by what memory was; too many: vLLM refuses to load",
        "Calibrate the inputs, or choose a scheme without static inputs",
        _inputs,
    ),
    Rule(
        "contract",
        "dtype and shape of each tensor are those of the format",
        "loaders cast dtypes and broadcast shapes in silence: the values are others",
        "Export again",
        _contract,
    ),
    Rule(
        "leftovers",
        "nothing is left of quantizers, and no tensor of another format",
        "engines stop at unknown names, or skip them: then a scale that matters is not used",
        "Remove them, or export again",
        _leftovers,
    ),
    Rule(
        "kv-scales",
        "a quantized key-value cache has k_scale and v_scale in every layer, as many as kv_cache_scheme says",
        "missing: the cache is scaled by 1, and saturates; without kv_cache_scheme the scales stop the load",
        "Export again; calibrate the cache's quantizers of every layer, or disable all",
        _cache,
    ),
)
