"""A Hugging Face model: its configuration with every default filled in, and the tensors of its files.

The only user of transformers, whose import takes seconds: it is imported late, so that a wrong path fails first.
Without transformers, `hf_defaults` completes the configuration, and the tensors of the files are unknown.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError

from amaxbridge.bridge.hf_defaults import completed
from amaxbridge.bridge.stored.checkpoint_kinds import is_training_output
from amaxbridge.bridge.weight_dtypes import check_known_to_torch
from amaxbridge.export.architectures.facts import architecture_of
from amaxbridge.export.dequantized import DequantizedCheckpoint, open_dequantized
from amaxbridge.export.disk.input_paths import given_path
from amaxbridge.export.disk.io_errors import changed_meanwhile, explaining_reads
from amaxbridge.export.disk.packed_experts import found_in
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.hub import model_directory, with_weights
from amaxbridge.export.output.config_and_index import CONFIG_FILE, read_config_json
from amaxbridge.mappings.config_fields import OF_FAMILIES, check_fields
from amaxbridge.mappings.errors import AmaxbridgeError, UnknownArchitectureError, UsageError, listing
from amaxbridge.mappings.extras import installed, need
from amaxbridge.mappings.families import CLASSIFIERS, FAMILIES, classes_of, family_of, relative_of
from amaxbridge.mappings.families.classifiers import SEQUENCES
from amaxbridge.mappings.family import ModelFamily, PackedExperts
from amaxbridge.mappings.family_file import FamilySource, find_family, judge
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.registry import MappingRegistry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


_log = logging.getLogger("amaxbridge")


class HasShape(Protocol):
    """A tensor, or what is known of one."""

    @property
    def shape(self) -> Sequence[int]: ...


OUTPUT_LAYER = "output_layer.weight"
"""Megatron's name of the output layer."""

NOT_COMPARED = (
    "transformers is not installed, so names and shapes were not compared with its own model: "
    "pip install 'amaxbridge[megatron]'"
)
"""Note for users who export or verify without transformers."""

_NO_PADDING = (
    "config.json has no pad_token_id: transformers then scores one sequence at a time, and its last token whatever it "
    "is; set the tokenizer's there to score batches"
)
_TRANSFORMERS = "transformers"
_HEADS_OF_MIXERS = (
    ("mamba_num_heads", "Mamba heads"),
    ("mamba_num_groups", "Mamba groups"),
    ("linear_num_key_heads", "key heads of gated delta nets"),
    ("linear_num_value_heads", "value heads of gated delta nets"),
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ALWAYS_WRITTEN = ("architectures", "dtype", "model_type", "transformers_version")


@dataclass(frozen=True)
class HFModel:
    """A Hugging Face model. Its directory need not hold weights, and there may be none.

    Args:
        directory: directory of its files; None if the model is only known from a Megatron checkpoint.
        written: config.json as it is on the disk; the output's config.json is made from it.
        filled: the same with the defaults of the architecture filled in.
        family: the model family that `architectures` names, or the user's own.
        notes: what users of the output must know about the configuration.
        changes: fields of `written` that the user gave in place of those on the disk.
    """

    directory: Path | None
    written: Mapping[str, Any] = field(repr=False)
    filled: Mapping[str, Any] = field(repr=False)
    family: ModelFamily = field(repr=False)
    notes: tuple[str, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)

    def check_unchanged(self) -> None:
        """Raises CheckpointError if config.json is another one by now."""
        if self.directory is not None and {**read_config_json(self.directory), **self.changes} != self.written:
            raise changed_meanwhile(self.directory / CONFIG_FILE)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """`filled`, or the language model's part of it in a multimodal model."""
        return self.family.language_config(self.filled)

    @property
    def source(self) -> str:
        """What describes the model, in messages."""
        return str(self.directory or "config.json, made of the saved arguments")

    @property
    def weights_directory(self) -> Path:
        """The directory of its weights. Those of a model on the Hub are downloaded now.

        Raises:
            UsageError: the model is only known from a Megatron checkpoint, or the Hub does not give its weights.
        """
        if self.directory is None:
            raise UsageError("a model described by saved arguments has no Hugging Face weights: give hf=")
        return with_weights(self.directory)

    def open_files(self, layout: PackedExperts | None = None) -> SafetensorsCheckpoint:
        """The tensors of its weights' files, under the names that mappings have.

        Those of a quantized directory keep their own names, by which its config.json says what is quantized.
        """
        others = {} if "quantization_config" in self.written else self.family.respelled
        spelling = partial(_respelled, others=others) if others else None
        return SafetensorsCheckpoint(self.weights_directory, found_in(layout), spelling)

    @property
    def tied(self) -> bool:
        """True if the output layer is the embedding; the last pipeline stage has a copy of it nevertheless."""
        return bool(self.config.get("tie_word_embeddings")) and self.family.classifier_of is None

    @property
    def without_tensor(self) -> frozenset[str]:
        """Megatron parameters without a Hugging Face tensor of their own."""
        return frozenset({OUTPUT_LAYER}) if self.tied else frozenset()

    @property
    def tied_head(self) -> tuple[str, ...]:
        """The names of a tied output layer, which files do not hold."""
        head = self.registry.megatron_to_hf_lookup(OUTPUT_LAYER) if self.tied else None
        return head.targets if head else ()

    @cached_property
    def model_config(self) -> ModelConfig:
        """The sizes that mappings read, with a vocabulary that is not padded."""
        return self.family.model_config(self.config)

    @cached_property
    def registry(self) -> MappingRegistry:
        """The mappings of this model."""
        return self.family.registry_for(self.config)

    @cached_property
    def file_tensors(self) -> Mapping[str, torch.Tensor] | None:
        """The language model's `expected_tensors` on the meta device, without a tied head; built once.

        A model of a user's own family that transformers has no class for has the tensors of the directory's files.
        """
        if self.family.file is not None and not _has_class(self):
            tensors = _tensors_of_files(self.directory, self.family, self.written)
        elif not installed(_TRANSFORMERS):
            return None
        else:
            tensors = self._tensors_of_transformers()
        if tensors is None:
            return None
        left = (*self.family.carried, *self.tied_head)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(left)}
        held, layout = self.packed_experts(tensors), self.family.packed_experts
        if held is None or layout is None or held.transposed == layout.transposed:
            return tensors
        return {
            name: each.transpose(1, 2) if each.ndim == 3 and ".experts." in name else each
            for name, each in tensors.items()
        }

    @contextmanager
    def open_weights(self) -> Iterator[DequantizedCheckpoint]:
        """Opens the tensors of the directory, with experts in whichever order of axes it has them."""
        layout = self.family.packed_experts
        if layout is not None and layout.either:
            with self.open_files() as checkpoint:
                layout = self.packed_experts({name: each.spec for name, each in checkpoint.tensors.items()})
        with self.open_files(layout) as checkpoint:
            yield open_dequantized(checkpoint, self.written)

    def packed_experts(self, tensors: Mapping[str, HasShape]) -> PackedExperts | None:
        """How files with these tensors pack the experts of a layer.

        Raises:
            MappingError: files may have either order of axes, and these do not tell which.
        """
        layout, known = self.family.packed_experts, architecture_of(self.filled)
        if layout is None or not layout.either or known is None:
            return layout
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if ".experts." in name}
        return replace(layout, transposed=known.with_axes_of(shapes).inputs_first)

    def _tensors_of_transformers(self) -> dict[str, torch.Tensor] | None:
        import transformers

        prefix = ""
        with _judged_by_transformers(self.source):
            if self.family.language_model is None:
                tensors = _file_tensors(lambda: transformers.AutoConfig.for_model(**self.filled))
            else:
                architecture, prefix = self.family.language_model
                kind = getattr(transformers, architecture).config_class
                tensors = _file_tensors(lambda: kind.from_dict({**self.config, "architectures": [architecture]}))
        return tensors and {prefix + name: tensor for name, tensor in tensors.items()}


def _respelled(name: str, *, others: Mapping[str, str]) -> str:
    prefix = next((each for each in others if name.startswith(each)), None)
    return name if prefix is None else others[prefix] + name.removeprefix(prefix)


def read_hf_model(
    path: str | Path,
    family: FamilySource | None = None,
    *,
    architecture: str | None = None,
    num_labels: int | None = None,
    revision: str | None = None,
) -> HFModel:
    """Reads a local directory, or fetches everything but the weights of a model on the Hub.

    Args:
        family: a family of the user's own: its file, or the family itself.
        architecture: a classifier of the model in config.json: …ForSequenceClassification, …ForTokenClassification.
        num_labels: the number of its labels.
        revision: branch, tag or commit of a model on the Hub, which `OWNER/MODEL@REVISION` says, too.

    Raises:
        UsageError: the directory or its config.json is missing, or the file of `family` is none; see `own_family`. Or
            `architecture` is no classifier of this model.
        UnknownArchitectureError: no family claims the model.
        MissingExtraError: config.json lacks fields that only transformers fills in, which is not installed.
    """
    directory = model_directory(path, weights=False, revision=revision)
    with explaining_reads(directory):
        if not (directory / CONFIG_FILE).is_file() and is_training_output(directory):
            raise UsageError(
                f"{directory} is not a Hugging Face model directory: no {CONFIG_FILE} there; it is what Megatron's "
                "training saved: give it as checkpoint=, and hf= a directory with config.json"
            )
    written = read_config_json(directory)
    changes = _as_classifier(written, architecture, num_labels)
    written = {**written, **changes}
    found = find_family(family, written)
    if found.file is not None and _config_class(written.get("model_type")) is None:
        return _own_model(HFModel(directory, written, written, found))
    if not installed(_TRANSFORMERS):
        return _checked(HFModel(directory, written, completed(written, found), found, (NOT_COMPARED,), changes))
    with _judged_by_transformers(directory / CONFIG_FILE):
        filled = {**_auto_config(directory, written).to_dict(), **changes}
    hf = _checked(HFModel(directory, written, filled, found, changes=changes))
    hf.check_unchanged()  # transformers has read it once more
    return hf if found.file is None else _own_model(hf)


def _as_classifier(written: Mapping[str, Any], architecture: str | None, num_labels: int | None) -> dict[str, Any]:
    """The fields that make a language model's config.json that of a classifier; none without `architecture`.

    Labels get the names that transformers gives them.

    Raises:
        UsageError: the architecture is no classifier of this model, or the number of labels is missing.
    """
    if architecture is None and num_labels is None:
        return {}
    named, known = written.get("architectures") or [], classes_of(written)
    if architecture not in (*known, *named):
        raise UsageError(
            f"architecture={architecture} is no classifier of {', '.join(named)}, which config.json says; "
            + (f"known: {', '.join(known)}" if known else "transformers has none")
        )
    if num_labels is None or num_labels < 1:
        raise UsageError(f"architecture={architecture} needs num_labels=, the rows of its head: 1 for a reward model")
    labels = {str(label): f"LABEL_{label}" for label in range(num_labels)}
    names = {name: int(label) for label, name in labels.items()}
    return {"architectures": [architecture], "id2label": labels, "label2id": names}


def _checked(hf: HFModel) -> HFModel:
    """The model, if the fields that its family reads have values that a model has."""
    check_fields(hf.config, hf.source, OF_FAMILIES)
    judge(hf.family, hf.config)
    if hf.family.architectures[0].endswith(SEQUENCES) and hf.config.get("pad_token_id") is None:
        return replace(hf, notes=(*hf.notes, _NO_PADDING))
    return hf


def _own_model(hf: HFModel) -> HFModel:
    """A model of a user's own family, with what its users must know."""
    hf = _checked(hf)
    notes = [f"the mappings are those of a family of the user's own, {Path(hf.family.file or '').name}"]
    if hf.file_tensors is None:
        notes.append(
            "names and shapes were compared with nothing: transformers has no class of the model, and the directory of "
            "config.json has no weights"
        )
    return replace(hf, notes=(*hf.notes, *notes))


def _config_class(model_type: object) -> Any:
    """transformers' configuration class of a model type; None if it has none, or is not installed."""
    if not installed(_TRANSFORMERS):
        return None
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type] if isinstance(model_type, str) and model_type in CONFIG_MAPPING else None


def _has_class(hf: HFModel) -> bool:
    """True if a user's own code registered the model's class with transformers."""
    kind = _config_class(hf.written.get("model_type"))
    if kind is None:
        return False
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None), "__name__", None) in hf.family.architectures


def _tensors_of_files(
    directory: Path | None, family: ModelFamily, config: Mapping[str, Any]
) -> dict[str, torch.Tensor] | None:
    """The tensors that the files of a directory hold, quantized weights as they are dequantized; None without files."""
    if directory is None or not any(directory.glob("*.safetensors")):
        return None
    with SafetensorsCheckpoint(directory, found_in(family.packed_experts)) as checkpoint:
        specs = open_dequantized(checkpoint, config).specs()
    return None if specs is None else {name: spec.meta() for name, spec in specs.items()}


@contextmanager
def _judged_by_transformers(file: Path | str) -> Iterator[None]:
    """Turns whatever transformers raises on values that it does not expect into a UsageError.

    Raises:
        UsageError: values of config.json contradict one another, or are of another type.
    """
    try:
        yield
    except AmaxbridgeError:
        raise
    except Exception as error:
        strict = str(error).partition("\n")[2].strip() if isinstance(error, StrictDataclassError) else ""
        why = strict or (str(error.args[0]) if error.args else "") or type(error).__name__
        raise UsageError(
            f"{file} is refused by transformers {version('transformers')}: {why}; "
            "correct it, or install the version that the model is for"
        ) from error


def _auto_config(directory: Path, written: Mapping[str, Any]) -> Any:
    """transformers' configuration of a directory with a config.json. Code that the directory brings is never run.

    A config.json may name a `model_type` of its own and code for it, and still be of an architecture that transformers
    knows: Kimi-K2 is a DeepSeek-V3. The architecture decides then.

    Raises:
        UsageError: config.json names an unknown dtype.
        Exception: anything that transformers raises; see `_judged_by_transformers`.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig  # late, because it takes seconds

    check_known_to_torch(written, str(directory / CONFIG_FILE))
    kind = None if written.get("model_type") in CONFIG_MAPPING else _class_of_architecture(written)
    if kind is None:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    fields, _ = PreTrainedConfig.get_config_dict(directory)
    return kind.from_dict({name: value for name, value in fields.items() if name not in ("model_type", "auto_map")})


def _class_of_architecture(written: Mapping[str, Any]) -> Any:
    """transformers' configuration class of an architecture that a family here claims; None for any other.

    One that transformers lacks may be another one's model, under names of its own.
    """
    import transformers

    try:
        family = family_of(written)
    except UnknownArchitectureError:
        return None
    named = [name for name in written["architectures"] if name in family.architectures]
    named += filter(None, map(relative_of, named))
    return next((getattr(transformers, name).config_class for name in named if hasattr(transformers, name)), None)


def make_hf_model(family: ModelFamily, fields: Mapping[str, Any], dtype: torch.dtype) -> HFModel:
    """A model without a directory, of the family's first architecture, from the fields of its config.json.

    Special tokens stay unset. Other fields have the defaults of transformers; a note lists them.

    Raises:
        UsageError: transformers refuses a field.
        MissingExtraError: transformers is not installed.
    """
    architecture = family.architectures[0]
    if family.file is not None:
        written = {"architectures": [architecture], "dtype": str(dtype).removeprefix("torch."), **fields}
        only = f"config.json has the fields alone that {Path(family.file).name} writes"
        hf = _own_model(HFModel(None, written, written, family))
        return replace(hf, notes=(*hf.notes, only))
    need("A config.json made of saved arguments", _TRANSFORMERS)
    made = {"architectures": [architecture], "dtype": dtype, **dict.fromkeys(_TOKENS), **fields}
    with _judged_by_transformers(f"a config.json of {architecture}, made of the saved arguments,"):
        config = _class_of_architecture(made)(**made)
    written = {**fields, **json.loads(config.to_json_string())}
    rest = [name for name in written if name not in {*fields, *_TOKENS, *_ALWAYS_WRITTEN}]
    unsaid = f"config.json has the defaults of transformers in {', '.join(rest)}, and no {', '.join(_TOKENS)}"
    return _checked(HFModel(None, written, config.to_dict(), family, (unsaid,)))


def expected_tensors(directory: Path) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of all tensors of a model as transformers saves it unquantized; None if it has no such model.

    None, with a warning, if transformers is not installed.

    The model is built without data. transformers keeps experts packed in memory and saves them one by one; the names
    are those on the disk. Layers for multi-token prediction are missing: transformers does not build them.

    Raises:
        UsageError: values of config.json contradict one another.
    """
    if not (given_path(directory) / CONFIG_FILE).is_file():  # transformers would look for it on the Hub
        return None
    if not installed(_TRANSFORMERS):
        _log.warning("%s", NOT_COMPARED)
        return None
    try:
        written = read_config_json(directory)
    except AmaxbridgeError:  # a rule of `verify` says why
        return None
    with _judged_by_transformers(directory / CONFIG_FILE):
        tensors = _file_tensors(lambda: _auto_config(directory, written))
    return None if tensors is None else {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _file_tensors(read_config: Callable[[], "PreTrainedConfig"]) -> dict[str, torch.Tensor] | None:
    from transformers.core_model_loading import revert_weight_conversion

    try:
        config = read_config()
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        _leave_rope_unscaled(config)
        with torch.device("meta"):
            model = _model_class(config)(config, dtype=torch.bfloat16)
    except (OSError, ValueError, KeyError, ImportError):  # no such model in transformers: other rules still apply
        return None
    return dict(revert_weight_conversion(model, model.state_dict()))


def _model_class(config: "PreTrainedConfig") -> Callable[..., Any]:
    """Makes transformers' model of a configuration: with its towers, if a family here carries them along, or its head.

    Of such a model, transformers' class for causal language models may be the language model alone.
    """
    import transformers

    for family in (*FAMILIES, *CLASSIFIERS):
        for name in config.architectures or ():
            if family.language_model is not None and name in family.architectures:
                raise ValueError(f"transformers saves {name} under names that published files do not have")
            if (family.carried or family.classifier_of) and name in family.architectures:
                make: Callable[..., Any] = getattr(transformers, name)._from_config
                return make
    return partial(transformers.AutoModelForCausalLM.from_config, trust_remote_code=False)


def _leave_rope_unscaled(config: "PreTrainedConfig") -> None:
    """Removes rotary scaling: no weight depends on it, and transformers does not build every kind."""
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if rope := getattr(part, "rope_parameters", None):
            part.rope_parameters = _unscaled(rope)


def _unscaled(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters, of all layers or of each kind of layer, without scaling."""
    if rope.get("rope_type") == "axial":  # how towers count rows and columns of patches, which is no scaling
        return dict(rope)
    if all(isinstance(value, Mapping) for value in rope.values()):
        return {kind: _unscaled(value) for kind, value in rope.items()}
    kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    return {"rope_type": "default", **kept}


def check_parallel_sizes(
    hf: HFModel, *, world: int, tp: int, pp: int, ep: int = 1, etp: int | None = None, even: bool = True
) -> None:
    """Raises UsageError if the model cannot be built at these sizes. The message lists every reason.

    Args:
        etp: tensor-parallel size of the experts; None for `tp`.
        even: True if all pipeline stages must have the same number of layers, as models built here.
    """
    sizes = hf.family.weight_settings(hf.config)
    heads, groups, layers = (sizes[name] for name in ("num_attention_heads", "num_query_groups", "num_layers"))
    reasons: list[tuple[object, str]] = [
        (world % (tp * pp), f"{world} processes do not divide into TP={tp} × PP={pp}"),
        (heads % tp, f"TP={tp} does not divide {heads} attention heads"),
        (groups % tp and tp % groups, f"TP={tp} and {groups} key-value heads do not divide one another"),
        (even and layers % pp, f"PP={pp} does not divide {layers} layers"),
    ]
    experts = sizes.get("num_moe_experts")
    for name, what in _HEADS_OF_MIXERS:
        count = sizes.get(name, 0)
        reasons.append((count % tp, f"TP={tp} does not divide {count} {what}"))
    if "-" in hf.family.layer_pattern(hf.config):
        width = sizes.get("ffn_hidden_size", 0)  # layers may differ
        reasons.append((width % tp, f"TP={tp} does not divide the MLP width of {width}"))
    if experts:
        reasons += _expert_reasons(experts, sizes["moe_ffn_hidden_size"], world=world, pp=pp, ep=ep, etp=etp or tp)
        shared = sizes.get("moe_shared_expert_intermediate_size") or 0
        reasons.append((shared % tp, f"TP={tp} does not divide the shared experts' width of {shared}"))
        biased = sizes.get("add_bias_linear") and (etp or tp) > 1
        reasons.append((biased, f"ETP={etp or tp} and experts with biases, which Megatron has at ETP=1 only"))
    else:
        reasons.append((ep > 1, f"EP={ep} needs experts, but the model has none"))
    found = [reason for wrong, reason in reasons if wrong]
    if found:
        raise UsageError(
            f"the model does not fit the parallel sizes:{listing(found)}\n"
            "Set parallel.tp, parallel.pp, parallel.ep and parallel.etp"
        )


def _expert_reasons(experts: int, width: int, *, world: int, pp: int, ep: int, etp: int) -> list[tuple[object, str]]:
    return [
        (world % (etp * ep * pp), f"{world} processes do not divide into ETP={etp} × EP={ep} × PP={pp}"),
        (experts % ep, f"EP={ep} does not divide {experts} experts"),
        (width % etp, f"ETP={etp} does not divide the expert width of {width}"),
    ]
