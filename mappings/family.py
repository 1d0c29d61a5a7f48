"""A model family: its mappings, and its configuration in Megatron's words. One declarative file each.

Two questions are kept apart. Which weights a model has, and how mappings take them apart, decides what can be exported:
`weight_settings`, `requires`. What its layers compute decides what can be built, filled and trained in Megatron:
`transformer_config`, `computes`, `check`. A rotary embedding that Megatron lacks never stops an export.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from amaxbridge.mappings.canonical import canonical
from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.hybrid_layers import (
    hybrid_name,
    read_pattern,
    transformer_name,
    transformer_pattern,
    transformer_settings,
)
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.megatron_settings import Settings
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.quantizers import per_expert_quantizer_mappings, quantizer_mappings
from amaxbridge.mappings.registry import MappingRegistry

type HFConfig = Mapping[str, Any]

_OF_THE_WHOLE_MODEL = ("architectures", "tie_word_embeddings")
"""Fields of a multimodal config.json that hold for its language model, whatever its own part says of them."""


@dataclass(frozen=True, slots=True)
class Translation:
    """A setting that is more than a field of the Hugging Face config under another name.

    Args:
        read: Hugging Face config → the setting.
        write: all settings → the fields of the Hugging Face config that express this one; a dot leads into a
            sub-dictionary. No fields if other settings express it.
    """

    read: Callable[[HFConfig], Any]
    write: Callable[[Settings], Mapping[str, Any]] = lambda settings: {}


type Source = str | Translation
"""How a Hugging Face config holds a setting: in a field (see `look_up`), or through a translation."""


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """How Hugging Face files hold all experts of a layer as one tensor, by default as transformers mostly does.

    experts.gate_up_proj   [experts, 2 · ffn, hidden]   experts.gate_up_proj_bias   [experts, 2 · ffn]
    experts.down_proj      [experts, hidden, ffn]       experts.down_proj_bias      [experts, hidden]

    Args:
        transposed: weights have their inputs first, `[experts, hidden, 2 · ffn]` and `[experts, ffn, hidden]`.
        interleaved: gate and up rows alternate (gate 0, up 0, gate 1, …), instead of all gate rows before all up rows.
        either: weights in files may also have the other order of axes; sizes tell. This one is written.
        names: what files call both tensors, in the module that holds the router, too.
    """

    transposed: bool = False
    interleaved: bool = False
    either: bool = False
    names: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True)
class ModelFamily:
    """Everything the program knows of a family of models.

    Args:
        architectures: entries of `architectures` in config.json that belong to the family.
        mappings: the weight mappings. Amax mappings and fused groups are derived.
        transformer: Megatron `TransformerConfig` field → its source in the Hugging Face config. Every field that
            mappings read is here, in `derived` or in `constants`.
        model: Megatron `GPTModel` or `HybridModel` argument → its source in the Hugging Face config.
        constants: `TransformerConfig` fields that are the same for every member of the family.
        derived: further `TransformerConfig` fields, if the model decides which ones there are.
        requires: fields of the Hugging Face config that must have this value if present, because the names, shapes or
            row order of weights depend on them.
        computed: further `TransformerConfig` fields that change what is computed but no weight.
        computes: fields of the Hugging Face config that must have this value if present, because Megatron's layers
            compute nothing else. No weight depends on them.
        check: raises UsageError for anything else that Megatron's layers do not compute.
        exceptions: Hugging Face config → mappings that depend on a number in it. They win over `mappings`.
        norm_over_all_heads: the query and key norms cover all heads of a token together; Megatron's cover one.
        norm_after_rotary: queries and keys are rotated before they are normalized; Megatron normalizes first.
        layers: further settings of Megatron's configuration that change what layers compute. A model is built with them
            but never compared with them: each training framework keeps them in another place.
        activation: the activation of the MLP, as Hugging Face configs name it.
        model_class: `gpt`, or the name of a class in `bridge.megatron` if Megatron-Core lacks the model.
        packed_experts: how unquantized files pack the experts of a layer; None if each expert has its own tensors.
        language_part: the field of config.json that holds the language model's configuration; None for all of it.
        language_model: the architecture that the language model has by itself, and the prefix of its names in files, if
            transformers does not save the whole under the names of published files; None if it does.
        carried: name prefixes of the tensors beside the language model, which exports copy from the Hugging Face files.
        respelled: prefix of tensor names in other files of the model → the prefix that `mappings` and `carried` have.
        hybrid_pattern: source of `hybrid_layer_pattern`, for a family that exists only as a HybridModel, with the same
            layers. None for transformers: a GPTModel, or a HybridModel with two layers for each.
        paired: layers of `hybrid_pattern` pair up into the files' decoder layers: a mixer, then MLP or experts.
        kept_in_fp32: name suffixes of the tensors that files hold in fp32, whatever the model's dtype.
        layer: (Megatron's own spec of a decoder layer, its TransformerConfig) → the spec of the model's layer, for a
            model whose layers Megatron-Core lacks. The spec given may be changed. Only called when a model is built.
        file: the file of a user's own family; None for those here.
        classifier_of: the architecture of the language model whose output layer is here a head with a row for each
            label: a reward model, a critic, a classifier. None for language models. See `families/classifiers.py`.
        alike: architectures that compute the same from the same Megatron tensors, under other names in files. Saved
            arguments that fit both are read as these.
    """

    architectures: tuple[str, ...]
    mappings: tuple[MegatronParamMapping, ...]
    transformer: Mapping[str, Source]
    model: Mapping[str, Source]
    constants: Mapping[str, Any] = field(default_factory=dict)
    derived: Translation = Translation(lambda hf_config: {})
    requires: Mapping[str, Any] = field(default_factory=dict)
    computed: Translation = Translation(lambda hf_config: {})
    computes: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[HFConfig], None] = lambda hf_config: None
    exceptions: Callable[[HFConfig], Iterable[MegatronParamMapping]] = lambda hf_config: ()
    norm_over_all_heads: bool = False
    norm_after_rotary: bool = False
    layers: Mapping[str, Source] = field(default_factory=dict)
    activation: str = "silu"
    model_class: str = "gpt"
    packed_experts: PackedExperts | None = None
    language_part: str | None = None
    language_model: tuple[str, str] | None = None
    carried: tuple[str, ...] = ()
    respelled: Mapping[str, str] = field(default_factory=dict)
    hybrid_pattern: Translation | None = None
    paired: bool = False
    kept_in_fp32: tuple[str, ...] = ()
    layer: Callable[[Any, Any], Any] | None = None
    file: str | None = None
    classifier_of: str | None = None
    alike: tuple[str, ...] = ()

    @cached_property
    def registry(self) -> MappingRegistry:
        """The weight mappings and the amax mappings derived from them, shared by all members of the family."""
        return _registry(self.mappings, self.file)

    @property
    def up_is_a_factor(self) -> bool:
        """True if a gated MLP multiplies what its up projection makes, as it is, by the gate."""
        return self.layers.keys().isdisjoint(("activation_func_clamp_value", "glu_linear_offset"))

    def has_in_layers(self, module: str) -> bool:
        """True if a decoder layer has this Megatron module with a weight."""
        return any(mapping.megatron_param == f"decoder.layers.*.{module}.weight" for mapping in self.mappings)

    def registry_for(self, hf_config: HFConfig) -> MappingRegistry:
        """The registry of one model, including the mappings that depend on its configuration."""
        exceptions = tuple(self.exceptions(hf_config))
        return self.registry.with_exceptions(_registry(exceptions, self.file)) if exceptions else self.registry

    def language_config(self, hf_config: HFConfig) -> HFConfig:
        """The configuration of the language model inside that of a model that may be multimodal."""
        if self.language_part is None:
            return hf_config
        of_all = {name: hf_config[name] for name in _OF_THE_WHOLE_MODEL if name in hf_config}
        return {**look_up(hf_config, self.language_part), **of_all}

    def weight_settings(self, hf_config: HFConfig) -> dict[str, Any]:
        """The fields of Megatron's TransformerConfig that mappings read: they decide names and shapes of weights.

        Raises:
            UsageError: the model has weights that the family's mappings do not take, or in another form.
        """
        require(hf_config, self.requires, "has weights that the mappings of its family do not take")
        return {**read_table(self.transformer, hf_config), **self.derived.read(hf_config), **self.constants}

    def transformer_config(self, hf_config: HFConfig) -> dict[str, Any]:
        """Keyword arguments for Megatron's TransformerConfig, without its parallel sizes and dtypes.

        Raises:
            UsageError: as `weight_settings`, or Megatron's layers do not compute what the model does.
        """
        require(hf_config, self.computes, "has no equal in Megatron's layers")
        self.check(hf_config)
        return {**self.weight_settings(hf_config), **self.computed.read(hf_config)}

    def check_buildable(self, hf_config: HFConfig) -> None:
        """Raises UsageError if Megatron's layers do not compute what the model does: it can only be exported."""
        self.settings(hf_config)

    def model_config(self, hf_config: HFConfig) -> ModelConfig:
        """The sizes that mappings read, without padding of the vocabulary."""
        sizes = {**self.weight_settings(hf_config), "vocab_size": look_up(hf_config, "vocab_size")}
        return ModelConfig.of(sizes | ({"num_labels": number_of_labels(hf_config)} if self.classifier_of else {}))

    def layer_settings(self, hf_config: HFConfig) -> dict[str, Any]:
        """Attributes of Megatron's TransformerConfig beyond `transformer_config`; some are not fields of it."""
        return read_table(self.layers, hf_config)

    def layer_pattern(self, hf_config: HFConfig) -> str:
        """The `hybrid_layer_pattern` of the model as a HybridModel, without pipeline stages."""
        if self.hybrid_pattern is not None:
            return str(self.hybrid_pattern.read(hf_config))
        return transformer_pattern(self.weight_settings(hf_config))

    def hybrid_config(self, hf_config: HFConfig) -> dict[str, Any]:
        """As `transformer_config`, for HybridModel, whose pattern says which layers there are."""
        return self._of_hybrid(self.transformer_config(hf_config), hf_config)

    def module_config(self, hf_config: HFConfig, pattern: str | None) -> dict[str, Any]:
        """`weight_settings` of a HybridModel with this `hybrid_layer_pattern`, or of a GPTModel (None)."""
        settings = self.weight_settings(hf_config)
        return settings if pattern is None else self._of_hybrid(settings, hf_config)

    def _of_hybrid(self, fields: dict[str, Any], hf_config: HFConfig) -> dict[str, Any]:
        layers = len(read_pattern(self.layer_pattern(hf_config)).decoder)
        return {**{name: value for name, value in fields.items() if name != "moe_layer_freq"}, "num_layers": layers}

    def spelling(self, pattern: str | None) -> Callable[[str], str]:
        """The function from the global Megatron name of a parameter or quantizer to its name in the mappings.

        Args:
            pattern: the `hybrid_layer_pattern` of a HybridModel, None for a GPTModel.
        """
        if pattern is None:
            return canonical
        return partial(transformer_name if self.hybrid_pattern is None or self.paired else hybrid_name, pattern=pattern)

    def model_arguments(self, hf_config: HFConfig) -> dict[str, Any]:
        """Keyword arguments for Megatron's model class: vocabulary, rotary base, tied embeddings."""
        return read_table(self.model, hf_config)

    def settings(self, hf_config: HFConfig) -> dict[str, Any]:
        """All settings of a model, in Megatron's names.

        Raises:
            UsageError: as `transformer_config`.
        """
        return {
            **self.transformer_config(hf_config),
            **self.model_arguments(hf_config),
            **self.layer_settings(hf_config),
            "activation": self.activation,
            **({} if self.hybrid_pattern is None else {"hybrid_layer_pattern": self.layer_pattern(hf_config)}),
        }

    def settings_of(self, found: Settings) -> Settings:
        """Settings of a GPTModel or HybridModel in the form of `settings`.

        Raises:
            MappingError: a HybridModel whose layers are not those of the family.
        """
        pattern = (found.get("hybrid_layer_pattern") or "").replace("|", "")
        if self.hybrid_pattern is not None:
            return {**found, "hybrid_layer_pattern": pattern}
        return {**found, **transformer_settings(pattern), "hybrid_layer_pattern": None} if pattern else found

    def hf_config(self, settings: Settings) -> dict[str, Any]:
        """The fields of a Hugging Face config that express these settings: all tables, read backwards.

        Raises:
            KeyError: a setting that the family needs is missing.
        """
        fields = write_table({**self.transformer, **self.model, **self.layers}, settings)
        fields |= {**self.derived.write(settings), **self.computed.write(settings)}
        if self.hybrid_pattern is not None:
            fields |= self.hybrid_pattern.write(settings)
        return _nested(fields)


def _registry(weights: Sequence[MegatronParamMapping], file: str | None) -> MappingRegistry:
    quantizers, per_expert = quantizer_mappings(weights), per_expert_quantizer_mappings(weights)
    return MappingRegistry(*weights, *quantizers, alternatives=per_expert, file=file)


def fixed(value: Any, **fields: Any) -> Translation:
    """A setting with one value for the whole family; `fields` express it in a Hugging Face config, if necessary."""
    return Translation(lambda hf_config: value, lambda settings: fields)


def read_table(table: Mapping[str, Source], hf_config: HFConfig) -> dict[str, Any]:
    """Reads the settings of a table from a Hugging Face config."""
    return {
        name: look_up(hf_config, source) if isinstance(source, str) else source.read(hf_config)
        for name, source in table.items()
    }


def write_table(table: Mapping[str, Source], settings: Settings) -> dict[str, Any]:
    """The fields of a Hugging Face config, by path, that express the settings of a table."""
    fields: dict[str, Any] = {}
    for name, source in table.items():
        fields |= {source: settings[name]} if isinstance(source, str) else source.write(settings)
    return fields


def _nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Nests fields given by path: `a.b` becomes `b` inside `a`."""
    nested: dict[str, Any] = {}
    for path, value in fields.items():
        *above, last = path.split(".")
        inner = nested
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return nested


def look_up(hf_config: HFConfig, path: str) -> Any:
    """A field of a Hugging Face config; a dot leads into a sub-dictionary.

    Raises:
        UsageError: the field is missing.
    """
    value: Any = hf_config
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise UsageError(f"the Hugging Face config has no {path!r}, which {hf_config.get('architectures')} needs")
        value = value[key]
    return value


def number_of_labels(hf_config: HFConfig) -> int:
    """The labels of a classifier. transformers keeps them as `id2label`, and takes `num_labels` for it.

    Raises:
        UsageError: the config says neither. transformers would take two labels for granted.
    """
    labels = hf_config.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else hf_config.get("num_labels")
    if not isinstance(count, int) or count < 1:
        raise UsageError(f"{hf_config.get('architectures')} needs the number of its labels: give num_labels=")
    return count


def require(hf_config: HFConfig, values: Mapping[str, Any], otherwise: str) -> None:
    """Checks that each of these fields has its required value, if the config has the field.

    Args:
        otherwise: end of the message: what is true of a model with another value.

    Raises:
        UsageError: some fields have another value. The message names them.
    """
    wrong = [f"{name}={hf_config[name]!r}" for name, value in values.items() if hf_config.get(name, value) != value]
    if wrong:
        architectures = ", ".join(hf_config.get("architectures") or ["the model"])
        raise UsageError(f"{architectures} with {', '.join(wrong)} {otherwise}")
