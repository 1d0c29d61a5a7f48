"""The matrices that a model multiplies with, `[out, in]`, taken from its modules and the code that runs them.

These are the oracle's truth. They come from transformers' modules: `nn.Linear` holds `[out, in]`, `Conv1D` `[in, out]`,
experts classes declare their layout to `use_experts_implementation` (`is_transposed`, `is_concatenated`, `has_gate`),
and the few experts classes that do not are in `UNDECLARED_EXPERTS`, read from their `forward`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

# Class → (inputs first, gate and up in one parameter).
UNDECLARED_EXPERTS = {
    "Llama4TextExperts": (True, True),
    "LongcatFlashExperts": (False, True),
    "Step3p7Experts": (False, True),
    "InklingSharedExperts": (False, False),
}
TOWER = "tower or projector"
# Modules that vLLM builds without a quantization config: what the file holds must be what the engine loads.
UNQUANTIZED_CLASSES = ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer")
_ROUTER_CLASS = re.compile(r"\w*(TopK|Topk|Router)\w*")
_ROUTER_NAME = re.compile(r"(.*\.)?(gate|router|wg|classifier|router_proj|modality_router)")


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of the model.

    Args:
        module: path of the module in transformers' tree.
        part: `weight`, `gate`, `up`, `down`, or the name of a bare parameter.
        expert: number of the expert; None outside of experts.
        kind: linear, conv1d, expert, embedding, or raw (a parameter that is none of these).
        weight: `[out, in]`.
        bias: `[out]`, or None.
        stays: why it must not be quantized; empty if it may be.
    """

    module: str
    part: str
    expert: int | None
    kind: str
    weight: Tensor
    bias: Tensor | None
    stays: str

    @property
    def name(self) -> str:
        return f"{self.module}[{self.expert}].{self.part}" if self.expert is not None else self.module


def matrices(model: nn.Module, experts: int, vocabulary: int) -> list[Matrix]:
    """Every matrix of a model, once; tied ones under their first name."""
    towers = _Towers(model)
    heads = _heads(model)
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    found = []
    for name, module in model.named_modules():
        for part, expert, kind, weight, bias in _of(module):
            if weight.is_meta or weight.dim() != 2:
                continue
            stays = ""
            if kind in ("embedding", "raw"):
                stays = kind
            elif module in heads or weight.shape[0] % vocabulary == 0:
                stays = "head"
            elif kind == "linear" and (reason := _kept(name, module, classes, experts)):
                stays = reason
            elif towers.holds(name):
                stays = TOWER
            found.append(Matrix(name, part, expert, kind, weight.detach(), bias, stays))
    inside = {each.weight.data_ptr() for each in found if each.stays != TOWER}
    return [
        replace(each, stays="") if each.stays == TOWER and each.weight.data_ptr() in inside else each for each in found
    ]


def _of(module: nn.Module) -> Iterator[tuple[str, int | None, str, Tensor, Tensor | None]]:
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        yield "weight", None, "linear", module.weight, module.bias
    elif isinstance(module, nn.Embedding):
        yield "weight", None, "embedding", module.weight, None
    elif name == "Conv1D":
        yield "weight", None, "conv1d", module.weight.t(), module.bias
    elif hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "down_proj"):
        yield from _experts(module, module.is_transposed, module.has_gate, module.is_concatenated)
    elif name in UNDECLARED_EXPERTS:
        transposed, packed = UNDECLARED_EXPERTS[name]
        yield from _experts(module, transposed, packed, True)
    elif name == "JetMoeParallelExperts":
        for expert, weight in enumerate(module.weight):
            yield "weight", expert, "expert", weight, None
    elif name == "DbrxExpertGLU":
        for part, parameter in (("gate", module.w1), ("up", module.v1), ("down", module.w2)):
            for expert, weight in enumerate(parameter.view(module.moe_num_experts, -1, parameter.shape[-1])):
                yield part, expert, "expert", weight.t() if part == "down" else weight, None
    else:
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2 and min(parameter.shape) > 1:
                yield part, None, "raw", parameter, None


def _experts(
    module: nn.Module, transposed: bool, gated: bool, concatenated: bool
) -> Iterator[tuple[str, int | None, str, Tensor, Tensor | None]]:
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() != 3:
            continue
        biases = getattr(module, f"{name}_bias", None)
        for expert, part in enumerate(parameter):
            weight = part.t() if transposed else part
            bias = None if biases is None or expert >= len(biases) else biases[expert]
            if name == "gate_up_proj":
                for which, rows in (("gate", 0), ("up", 1)):
                    cut = _half(rows, len(weight), concatenated)
                    yield which, expert, "expert", weight[cut], None if bias is None else bias[cut]
            else:
                yield name.removesuffix("_proj"), expert, "expert", weight, bias


def _half(which: int, rows: int, concatenated: bool) -> slice:
    return slice(which * rows // 2, (which + 1) * rows // 2) if concatenated else slice(which, rows, 2)


def _heads(model: Any) -> list[nn.Module]:
    try:
        head = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return []
    return [head] if isinstance(head, nn.Module) else []


def _kept(name: str, module: nn.Linear, classes: dict[str, str], experts: int) -> str:
    ancestors = [classes[name[:end]] for end in range(len(name) + 1) if end == len(name) or name[end : end + 1] == "."]
    above = ancestors[:-1]
    if any("Indexer" in each for each in above) and not name.endswith(("wq_b", "q_b_proj")):
        return "indexer"  # vLLM quantizes the queries' projection alone
    if any(_ROUTER_CLASS.fullmatch(each) for each in above):
        return "router"
    if module.out_features <= 2 * experts and _ROUTER_NAME.fullmatch(name):
        return "router"
    if module.out_features == 1 and "gate" in name:
        return "gate of one output"
    if any(each in UNQUANTIZED_CLASSES for each in above):
        return "mixer that vLLM builds unquantized"
    return ""


class _Towers:
    """What of a composite model is not its language model: towers and projectors.

    Where the configuration is the language model's own, towers are the parts with a configuration of vision or sound.
    Where the language model is a part and there are such towers, everything outside of it is a tower or a projector.
    """

    def __init__(self, model: Any) -> None:
        from transformers import PreTrainedModel

        config = model.config
        parts = {
            name: module.config
            for name, module in model.named_modules()
            if name and isinstance(module, PreTrainedModel) and module.config is not config
        }
        # A stack with a configuration of the whole model's class is its encoder or decoder (UDOP), whatever its fields.
        self._towers = [name for name, part in parts.items() if is_tower(part) and type(part) is not type(config)]
        self._language = [name for name, part in parts.items() if is_language(part) and not _under(name, self._towers)]
        self._language += [  # a decoder that has the configuration of the whole
            name
            for name, module in model.named_modules()
            if type(module).__name__.endswith("DecoderModel") and getattr(module, "text_config", None) is not None
        ]
        self._inside = not hasattr(config, "vocab_size") or "text_config" in config.sub_configs

    def holds(self, name: str) -> bool:
        """True if a module is a part of a tower, or a projector."""
        if self._towers and self._language and self._inside:
            return not _under(name, self._language)
        return _under(name, self._towers)


def _under(name: str, roots: list[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


_TOWER = re.compile(
    r"vision|audio|image|speech|qformer|codec|vq|protein|saprot|vit|siglip|clip|sam|mimi|encodec|dac|dit|timm"
)
_TOWER_FIELDS = ("image_size", "num_mel_bins")
_TOWER_FIELDS_WITHOUT_TOKENS = ("num_channels", "in_channels", "sampling_rate")


def is_tower(config: Any) -> bool:
    """True if a configuration is one of images, sound or proteins, and of no language model."""
    name = (config.model_type or type(config).__name__).lower()
    if "text_config" in config.sub_configs or name.endswith("text"):
        return False
    fields = _TOWER_FIELDS if hasattr(config, "vocab_size") else _TOWER_FIELDS + _TOWER_FIELDS_WITHOUT_TOKENS
    return _TOWER.search(name) is not None or any(hasattr(config, each) for each in fields)


def is_language(config: Any) -> bool:
    """True if a configuration is a language model's."""
    return hasattr(config, "vocab_size") and not config.sub_configs and not is_tower(config)
