"""What transformers' own model says of its tensors: role, axes and place of each, in the files' spelling.

Nothing here knows a model type. A tensor's role follows from the class of the module that holds it and from where that
module lies: in the language model, beside it, or in a head.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Interleave,
    LayerPairCollapse,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D

from amaxbridge.export.architectures.facts import pattern_of
from tests.architectures.models import text_config_of

_ROUTERS = re.compile(r".*(Router|TopKGating|Gating)|.*AltUp")
_ROUTER_NAMES = re.compile(r"(gate|router|router_gate|classifier|wg|shared_expert_gate|modality_router)")
_INDEXER = re.compile(r".*Indexer.*")
_RECURRENT = re.compile(r"(Mamba|FalconMamba|JambaMamba|ZambaMamba)Mixer")
"""Mixers that engines build unquantized."""
_KERNELS = re.compile(r".*Dynamic\w*Convolution")
"""Convolutions with a linear layer that computes their weights. Published code holds that as a bare parameter."""
_BESIDE_TEXT = re.compile(
    r".*(\.|^)((vision|visual|image|img|video|audio|speech|protein|mm)\w*|multi_modal_projector|embed_tokens_extend"
    r"|\w*connector|\w*resampler\w*|\w*aligner|adapter|codec\w*)(\.|$).*"
)
_PUBLISHED_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("lm_head.", "language_model.lm_head."),
)
"""Where modules lie in transformers, and where older files have them."""
_TEXT_BESIDE_TEXT = (
    "BertConfig",
    "BltGlobalTransformerConfig",
    "BltLocalDecoderConfig",
    "BltLocalEncoderConfig",
    "DiaEncoderConfig",
    "T5Gemma2EncoderConfig",
    "T5Gemma2TextConfig",
    "T5GemmaModuleConfig",
)
"""Configurations of parts of a language model that lie beside its decoder."""

_HOLDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "gate_up_proj": ("gate_proj", "up_proj"),
        "gate_proj": ("gate_proj",),
        "up_proj": ("up_proj",),
        "down_proj": ("down_proj",),
    }
)
_TRANSPOSED: Mapping[str, bool] = MappingProxyType(
    {"Llama4TextExperts": True, "Step3p7Experts": False, "LongcatFlashExperts": False, "InklingSharedExperts": False}
)
"""Read in `forward` of experts that do not declare it: True if they multiply with `@`, False with `F.linear`."""


_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(.+)")
_IN_LAYER = re.compile(r"(.*\.)layers\.(\d+)\.(self_attn|mlp|lambda_1|lambda_2)((?:\..+)?)")
_BLOCKS: Mapping[str, tuple[str, int]] = MappingProxyType(
    {"self_attn": ("mixer", 0), "mlp": ("mixer", 1), "lambda_1": ("attn_alpha", 0), "lambda_2": ("mlp_alpha", 1)}
)
"""Part of a layer → its block in files of layer pairs, and if that is the second of the pair."""


@dataclass(slots=True)
class TensorFact:
    """What is known of the tensors of one pattern.

    Args:
        role: `linear`, `experts`, or why the tensor stays unquantized.
        shapes: the shape in each model where there is one; None where layers differ.
        module: the module's pattern in transformers, if it is spelled in another way.
        layout: of packed experts: which projections, the order of axes, if gate and up alternate, as in the table; of
            a router that is no linear layer: that it is a bare parameter.
        numbers: of experts one by one: how many a layer has in each model.
    """

    role: str
    module: str
    shapes: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    layout: Mapping[str, Any] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)


def language_prefixes(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Paths of the language models in a model, and of the models beside them."""
    text = text_config_of(model.config)
    inside, beside = [], []
    for name, module in model.named_modules():
        if not name or not isinstance(module, PreTrainedModel):
            continue
        of_text = module.config is text or type(module.config) is type(text)
        of_text |= type(module.config).__name__ in _TEXT_BESIDE_TEXT
        # a decoder beside an encoder, with the configuration of both (DiffusionGemma)
        of_text |= type(module).__name__.endswith("DecoderModel") and getattr(module, "text_config", None) is text
        if of_text or module.config is not model.config:
            (inside if of_text else beside).append(name)
    return inside, beside


def tensors(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Pattern → shape of the tensors that a model has."""
    return {pattern_of(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def derive(model: PreTrainedModel, variant: str, facts: dict[str, TensorFact]) -> None:
    """Adds the facts of one model."""
    state = dict(model.state_dict())
    modules, prefixes = dict(model.named_modules()), language_prefixes(model)
    heads = [each.get_output_embeddings() for each in modules.values() if isinstance(each, PreTrainedModel)]
    heads += [each for name, each in modules.items() if name.endswith("decoder.output_projection")]  # FSMT's own
    heads += [each for head in heads if head is not None for each in head.children()]  # of several codebooks
    roles = {name: _role(model, name, tensor, modules, heads, *prefixes) for name, tensor in state.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    pairs = any(isinstance(each, LayerPairCollapse) for each in get_model_conversion_mapping(model, add_legacy=False))
    for names in _spellings(model):
        counts = Counter(key for stored in names if (key := _layer_of_experts(stored)) is not None)
        for stored, (target, shape) in names.items():
            if target not in roles:
                continue
            role, layout = roles[target], {}
            if role == "experts":
                role, layout = _packed(model, stored, target, shape, shapes[target])
            if role == "router" and not isinstance(modules[target.rpartition(".")[0]], nn.Linear | Conv1D):
                layout = {"bare": True}
            module = pattern_of(target)
            if pairs and LayerPairCollapse.pattern.search(stored):
                module = module.replace("*", "*/2", 1)
            fact = TensorFact(role, module, {variant: shape}, layout)
            known = facts.setdefault(pattern_of(stored), fact)
            if (key := _layer_of_experts(stored)) is not None:
                known.numbers[variant] = max(known.numbers.get(variant, 0), counts[key])
            if known.shapes.setdefault(variant, shape) != shape:
                known.shapes[variant] = None
            if (known.role, known.layout) != (fact.role, fact.layout) and {known.role, fact.role} & {
                "linear",
                "experts",
            }:
                raise ValueError(f"{stored}: {known} and {fact}")


def _layer_of_experts(stored: str) -> tuple[str, str] | None:
    """The layer and the projection of a tensor that is of one numbered expert; None for others."""
    found = _EXPERT.fullmatch(stored)
    return None if found is None else (found[1], found[2])


def _spellings(model: PreTrainedModel) -> Iterable[dict[str, tuple[str, tuple[int, ...]]]]:
    """Name in the files → name in the model and shape in the files, in the modules' spelling and in the files'."""
    state = dict(model.state_dict())
    yield {name: (name, tuple(tensor.shape)) for name, tensor in state.items()}
    forward = get_model_conversion_mapping(model, add_legacy=False)
    if not forward:
        return
    renamings = [each for each in forward if isinstance(each, WeightRenaming)]
    converters = [each for each in forward if isinstance(each, WeightConverter)]

    def target(name: str) -> str:
        return rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]

    reverted = revert_weight_conversion(model, state)
    yield {name: (target(name), tuple(tensor.shape)) for name, tensor in reverted.items()}
    # Reading takes several spellings where saving writes one, so candidates are held against the reading direction.
    yield {
        candidate: (name, tuple(tensor.shape))
        for name, tensor in state.items()
        for module, published in _PUBLISHED_PREFIXES
        if name.startswith(module)
        and (candidate := published + name.removeprefix(module)) not in state
        and target(candidate) == name
    }
    if any(isinstance(each, LayerPairCollapse) for each in forward):
        yield {
            candidate: (name, tuple(tensor.shape))
            for stored, tensor in reverted.items()
            for candidate, name in [(in_pairs(stored), target(stored))]
            if target(candidate) == name
        }
    prefixes = [each.reverse_transform() for each in forward if isinstance(each, PrefixChange)]
    for prefix in prefixes:
        yield {
            renamed: (target(name), tuple(tensor.shape))
            for name, tensor in {**state, **reverted}.items()
            if (renamed := prefix.rename_source_key(name)[0]) != name
        }


def in_pairs(name: str) -> str:
    """The name of a tensor in files that number a layer's attention and MLP one by one: transformers' reading reversed.

    Names of other tensors stay as they are.
    """
    found = _IN_LAYER.fullmatch(name)
    if found is None:
        return name
    block, behind = _BLOCKS[found[3]]
    return f"{found[1]}layers.{2 * int(found[2]) + behind}.{block}{found[4]}"


def _role(
    model: PreTrainedModel,
    name: str,
    tensor: Tensor,
    modules: Mapping[str, nn.Module],
    heads: Collection[nn.Module | None],
    inside: list[str],
    beside: list[str],
) -> str:
    path = name.rpartition(".")[0]
    module = modules[path]
    parents = [modules[path.rsplit(".", depth)[0]] for depth in range(1, path.count(".") + 1)]
    classes = [type(each).__name__ for each in (module, *parents)]
    of_text = _nearest(path, inside), _nearest(path, beside)
    composite = bool(beside) or any(isinstance(each, PreTrainedConfig) for each in vars(model.config).values())
    if len(of_text[1]) > len(of_text[0]) or (composite and _BESIDE_TEXT.fullmatch(path)):
        return "tower"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if module in heads:
        return "head"
    if not of_text[0]:
        return "tower" if composite else "head"
    if tensor.dim() < 2:
        return "vector"
    last = path.rpartition(".")[2]
    if any(map(_INDEXER.fullmatch, classes)):
        return "indexer"
    if any(map(_RECURRENT.fullmatch, classes)):
        return "recurrent"
    if isinstance(module, nn.Linear | Conv1D):
        if _ROUTER_NAMES.fullmatch(last) or any(map(_ROUTERS.fullmatch, classes[:4])):
            return "router"
        if any(map(_KERNELS.fullmatch, classes[1:2])):
            return "convolution"
        return "linear" if isinstance(module, nn.Linear) else "inputs_first"
    if classes[0].endswith(("Experts", "ParallelExperts", "ExpertGLU")):
        return "experts"
    if any(map(_ROUTERS.fullmatch, classes[:2])) or _ROUTER_NAMES.fullmatch(last):
        return "router"
    if "Conv" in classes[0]:
        return "convolution"
    return "parameter"


def _nearest(path: str, prefixes: Iterable[str]) -> str:
    return max((each for each in prefixes if path == each or path.startswith(each + ".")), key=len, default="")


def _packed(
    model: PreTrainedModel, stored: str, target: str, shape: tuple[int, ...], in_memory: tuple[int, ...]
) -> tuple[str, dict[str, Any]]:
    """How a file's tensor holds experts: one expert's projection, or some projections of all."""
    layout: dict[str, Any]
    path, _, part = target.rpartition(".")
    if part.endswith("bias"):
        layout = {"holds": list(_HOLDS.get(part.removesuffix("_bias"), ())), "bias": True}
        alternate = not getattr(model.get_submodule(path), "is_concatenated", True)
        return "experts", {**layout, "interleaved": True} if alternate else layout
    if len(in_memory) != 3:
        return "opaque", {}
    if len(shape) == 2:
        return "linear", {}
    experts = model.get_submodule(path)
    name = type(experts).__name__
    # an inner name of the file's, where each projection has a tensor of its own
    file_part = next((each for each in ("gate_proj", "up_proj", "down_proj") if f".{each}." in stored), part)
    conversion = _conversion_of(model, stored)
    targets = [target.rpartition(".")[2] for target in (conversion.target_patterns if conversion else ())]
    holds = ("gate_proj", "up_proj") if targets == ["gate_proj", "up_proj"] else _HOLDS.get(file_part)
    declared = hasattr(experts, "is_transposed")
    if holds is None or not (declared or name in _TRANSPOSED):
        return "opaque", {}
    transposed = _TRANSPOSED.get(name, getattr(experts, "is_transposed", False))
    operations = conversion.operations if conversion else []
    layout = {"holds": list(holds)}
    if any(isinstance(each, Transpose) and each.check_dims for each in operations):
        layout["inputs_first"] = "either"  # transformers takes the one that fits the configuration
    elif transposed != any(isinstance(each, Transpose) for each in operations):
        layout["inputs_first"] = True
    if not getattr(experts, "is_concatenated", True) or any(isinstance(each, Interleave) for each in operations):
        layout["interleaved"] = True
    return "experts", layout


def _conversion_of(model: PreTrainedModel, stored: str) -> WeightConverter | None:
    """The one conversion that transformers applies to a file's tensor, after all renamings; None if there is none."""
    every = get_model_conversion_mapping(model, add_legacy=False)
    renamed, _ = rename_source_key(stored, [each for each in every if isinstance(each, WeightRenaming)], [])
    converters = (each for each in every if isinstance(each, WeightConverter))
    return next((each for each in converters if each.rename_source_key(renamed)[1] is not None), None)
