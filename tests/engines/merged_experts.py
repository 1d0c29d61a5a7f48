"""Which single experts transformers takes where its modules have packed ones, asked of its models."""

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from amaxbridge.export.architectures.facts import KNOWN, Role, architecture_of
from tests.architectures.models import build, config_of


def merged_experts() -> dict[str, list[str]]:
    """Architecture whose experts are packed → the projections that it takes of single ones; none if it takes none."""
    names = sorted({file.stem.partition(".")[0] for file in KNOWN.glob("*.json")})
    return {name: projections(name) for name in names if _packs_experts(name)}


def projections(architecture: str) -> list[str]:
    """The projections that transformers takes of single experts."""
    return sorted(_taken(build(architecture, config_of(architecture))))


def _packs_experts(architecture: str) -> bool:
    known = architecture_of({"architectures": [architecture]})
    assert known is not None
    return any(fact.role is Role.EXPERTS for fact in known.facts.values())


def _taken(model: PreTrainedModel) -> set[str]:
    if any(type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION for module in model.modules()):
        return {"gate_proj", "up_proj", "down_proj"}  # it has a module for each expert while the model is quantized
    return {
        pattern.removesuffix("$").removesuffix(".weight").rpartition(".")[2]
        for conversion in get_model_conversion_mapping(model, add_legacy=False)
        if isinstance(conversion, WeightConverter)
        and any(isinstance(each, MergeModulelist) for each in conversion.operations)
        for pattern in conversion.source_patterns
    }
