"""A model family: its mappings, and its configuration in Megatron's words. One declarative file each."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from mappings.errors import UsageError
from mappings.hybrid import hybrid_name, read_pattern, transformer_name, transformer_pattern
from mappings.mapping import MegatronParamMapping
from mappings.quantizers import per_expert_quantizer_mappings, quantizer_mappings
from mappings.registry import MappingRegistry
from mappings.spelling import canonical

type Source = str | Callable[[Mapping[str, Any]], Any]
"""Where a value comes from: a field of the Hugging Face config (see `look_up`), or a function of the config."""


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """How Hugging Face files hold all experts of a layer as one tensor, by default as transformers mostly does.

    experts.gate_up_proj   [experts, 2 · ffn, hidden]   experts.gate_up_proj_bias   [experts, 2 · ffn]
    experts.down_proj      [experts, hidden, ffn]       experts.down_proj_bias      [experts, hidden]

    Args:
        transposed: weights have their inputs first, `[experts, hidden, 2 · ffn]` and `[experts, ffn, hidden]`.
        interleaved: gate and up take turns (gate 0, up 0, gate 1, …), in place of all of gate, then all of up.
    """

    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class ModelFamily:
    """Everything the program knows of a family of models.

    Args:
        architectures: entries of `architectures` in config.json that belong to it.
        mappings: the weights. Amax mappings and fused groups are derived.
        transformer: Megatron `TransformerConfig` field → where its value comes from.
        model: Megatron `GPTModel` or `HybridModel` argument → where its value comes from.
        constants: `TransformerConfig` fields that are the same for every member of the family.
        derived: Hugging Face config → further `TransformerConfig` fields, where it depends on the model which ones.
        exceptions: Hugging Face config → mappings that need a number from it. They win over `mappings`.
        norm_over_all_heads: the query and key norms see all heads of a token together; Megatron's see one.
        layers: further settings of Megatron's configuration, of what the layers compute. A model is built with them
            and never compared with them: training frameworks keep these each in its own place.
        activation: of the MLP, as Hugging Face configs name it.
        model_class: `gpt`, or a name of one in `bridge.megatron` where Megatron-Core has no such model.
        packed_experts: how files that are not quantized hold the experts of a layer; None for tensors of each expert.
        hybrid_pattern: Hugging Face config → `hybrid_layer_pattern`, for a family that only HybridModel has and whose
            layers are HybridModel's. None for transformers: GPTModel, or HybridModel with two layers for each.
    """

    architectures: tuple[str, ...]
    mappings: tuple[MegatronParamMapping, ...]
    transformer: Mapping[str, Source]
    model: Mapping[str, Source]
    constants: Mapping[str, Any] = field(default_factory=dict)
    derived: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda hf_config: {}
    exceptions: Callable[[Mapping[str, Any]], Iterable[MegatronParamMapping]] = lambda hf_config: ()
    norm_over_all_heads: bool = False
    layers: Mapping[str, Source] = field(default_factory=dict)
    activation: str = "silu"
    model_class: str = "gpt"
    packed_experts: PackedExperts | None = None
    hybrid_pattern: Callable[[Mapping[str, Any]], str] | None = None

    @cached_property
    def registry(self) -> MappingRegistry:
        """The weight mappings and the amax mappings derived from them: what all members of the family share."""
        return _registry(self.mappings)

    def registry_for(self, hf_config: Mapping[str, Any]) -> MappingRegistry:
        """The registry of one model, with the mappings that only its configuration tells."""
        exceptions = tuple(self.exceptions(hf_config))
        return self.registry.with_exceptions(_registry(exceptions)) if exceptions else self.registry

    def transformer_config(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments for Megatron's TransformerConfig, without its parallel sizes and dtypes."""
        return {**_translate(self.transformer, hf_config), **self.derived(hf_config), **self.constants}

    def layer_settings(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """Attributes of Megatron's TransformerConfig beyond `transformer_config`, some of which it has no field for."""
        return _translate(self.layers, hf_config)

    def layer_pattern(self, hf_config: Mapping[str, Any]) -> str:
        """The `hybrid_layer_pattern` of the model as a HybridModel, without pipeline stages."""
        if self.hybrid_pattern is not None:
            return self.hybrid_pattern(hf_config)
        return transformer_pattern(self.transformer_config(hf_config))

    def hybrid_config(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """As `transformer_config`, for HybridModel, whose pattern says which layers there are."""
        fields = {
            **self.transformer_config(hf_config),
            "num_layers": len(read_pattern(self.layer_pattern(hf_config)).decoder),
        }
        fields.pop("moe_layer_freq", None)
        return fields

    def spelling(self, pattern: str | None) -> Callable[[str], str]:
        """Global Megatron name, of a parameter or quantizer → the name that this family's mappings have for it.

        Args:
            pattern: the `hybrid_layer_pattern` of a HybridModel, None for a GPTModel.
        """
        if pattern is None:
            return canonical
        return partial(transformer_name if self.hybrid_pattern is None else hybrid_name, pattern=pattern)

    def model_arguments(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments for Megatron's model class: vocabulary, rotary base, tied embeddings."""
        return _translate(self.model, hf_config)


def _registry(weights: Sequence[MegatronParamMapping]) -> MappingRegistry:
    quantizers, per_expert = quantizer_mappings(weights), per_expert_quantizer_mappings(weights)
    return MappingRegistry(*weights, *quantizers, alternatives=per_expert)


def _translate(table: Mapping[str, Source], hf_config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        megatron: source(hf_config) if callable(source) else look_up(hf_config, source)
        for megatron, source in table.items()
    }


def look_up(hf_config: Mapping[str, Any], path: str) -> Any:
    """A field of a Hugging Face config; a dot goes into a sub-dictionary.

    Raises:
        UsageError: there is none.
    """
    value: Any = hf_config
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise UsageError(f"the Hugging Face config has no {path!r}, which {hf_config.get('architectures')} needs")
        value = value[key]
    return value


def require(hf_config: Mapping[str, Any], **values: Any) -> None:
    """Checks that each field, where the config has it, is the one value that Megatron's layers compute.

    Raises:
        UsageError: some are not; names them.
    """
    wrong = [f"{name}={hf_config[name]!r}" for name, value in values.items() if hf_config.get(name, value) != value]
    if wrong:
        raise UsageError(f"{hf_config.get('architectures')} with {', '.join(wrong)} has no equal in Megatron's layers")
