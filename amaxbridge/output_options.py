"""The options of an export, declared once for the command line, the Python API and the documentation.

A field has its type, its default, its meaning and its name on the command line. Nothing heavy is imported: `--help`
shows these meanings and must not wait for torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from amaxbridge.export.progress import Progress
    from amaxbridge.export.schemes import Recipe

MEANING, COMMAND_LINE = "help", "command_line"
"""Keys of a field's metadata; `COMMAND_LINE` is None for options that only Python has."""


def _option(default: Any, command_line: str | None, meaning: str) -> Any:
    return field(default=default, metadata={MEANING: meaning, COMMAND_LINE: command_line})


def _of_exports(name: str) -> Any:
    """An option that exports have, too."""
    found = next(each for each in fields(OutputOptions) if each.name == name)
    return field(default=found.default, metadata=found.metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """The options of every export, whatever its source."""

    scheme: "str | Recipe | None" = _option(
        "nvfp4",
        "scheme",
        "How to quantize: the name of a scheme, or a recipe; auto: as the training's quantizers say; none: plain "
        "weights.",
    )
    format: str = _option(
        "compressed-tensors",
        "format",
        "How quantized files are laid out: compressed-tensors; or modelopt, the names and the hf_quant_config.json of "
        "ModelOpt's own exporter, for TensorRT-LLM, NeMo-RL and verl. Codes are the same bytes.",
    )
    ignore: Sequence[str] = _option(
        (),
        "ignore",
        "More modules to leave unquantized: full names, or re: patterns. Each must match a module.",
    )
    base_model: str | None = _option(
        None,
        "base_model",
        "Name of the source on the Hub, for the model card; null for the one that the Hub's cache tells.",
    )
    missing_amax: str = _option(
        "error",
        "amax.missing",
        "What to do about an amax that is missing, zero or not finite: error; from_weights; or group_max, the largest "
        "of its fused group.",
    )
    mixed_groups: str = _option(
        "error",
        "mixed_groups",
        "Modules that engines run as one layer (q/k/v, gate/up, the experts of a layer) and that have several formats: "
        "error; or unquantized, to write such groups in 16 bits.",
    )
    nonfinite: str = _option(
        "warn",
        "nonfinite",
        "NaN or Inf in a tensor that stays unquantized: warn, or error. In a weight to quantize it is always an error.",
    )
    overwrite: bool = _option(False, "io.overwrite", "Replace what is at output.")
    hash_source: bool = _option(
        False,
        "io.hash_source",
        "Detect a source that changes during the run by hashing every byte. The default compares inodes and times, "
        "which object-store mounts invent. Reads the source twice more.",
    )
    dry_run: bool = _option(False, "dry_run", "Plan and check everything, and write nothing.")
    verify: bool = _option(True, "verify", "Check the output before it is moved into place.")
    progress: "Progress | None" = _option(None, None, "Is told how far the export has come.")
    record: Mapping[str, Any] | None = _option(
        None,
        None,
        "How the export was asked for, kept in amaxbridge.json; its command_line is shown in the model card.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairOptions:
    """The options of a repair."""

    unseen: str = _option(
        "error",
        "unseen",
        "An expert without a usable input scale, which saw no token in calibration: error; or layer_max, the largest "
        "input amax of the same projection in its layer.",
    )
    copy: bool = _option(False, "copy", "Where nothing is wrong, write a copy, byte for byte; otherwise nothing.")
    overwrite: bool = _of_exports("overwrite")
    hash_source: bool = _of_exports("hash_source")
    dry_run: bool = _of_exports("dry_run")
    verify: bool = _of_exports("verify")
    progress: "Progress | None" = _of_exports("progress")
    record: Mapping[str, Any] | None = _of_exports("record")


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions(OutputOptions):
    """The options of an export from Megatron."""

    max_shard_bytes: int = _option(5_000_000_000, "io.max_shard_gb", "Largest safetensors file.")
    dtype: str | None = _option(
        None,
        "dtype",
        "Dtype of the weights: bfloat16, float16 or float32; null for the one in config.json if the weights are fp32, "
        "and their own otherwise.",
    )
    weights: str = _option(
        "model",
        "weights",
        "Which weights of a checkpoint: model, those that training computed with; or fp32_main, the fp32 main "
        "parameters of its optimizer, of which those are roundings.",
    )
    adapter: str | None = _option(
        None,
        "adapter.mode",
        "What to do with adapters (LoRA, DoRA): merge them into the weights; write them only, as a directory for PEFT; "
        "null to refuse them.",
    )
    adapter_alpha: float | None = _option(
        None, "adapter.alpha", "Alpha of the adapters, where no run_config.yaml beside the checkpoint says it."
    )
    adapter_base: str | None = _option(
        None,
        "adapter.base",
        "Megatron checkpoint of the model, for adapters that were saved alone; null for the weights in hf.",
    )
    weight_amax: str = _option(
        "stored",
        "amax.weights",
        "Weight amax where adapters are merged in: stored, if they cover the merged weights; or remeasure, to take "
        "them anew from the merged weights.",
    )
    quant_state: bool = _option(
        False, "quant_state", "Write quant_state.safetensors too; with scheme=none, to quantize later."
    )


class OutputKeywords(TypedDict, total=False):
    """`OutputOptions` as keywords, for type checkers; scheme and ignore are arguments of their own."""

    format: str
    base_model: str | None
    missing_amax: str
    mixed_groups: str
    nonfinite: str
    overwrite: bool
    hash_source: bool
    dry_run: bool
    verify: bool
    progress: "Progress | None"
    record: Mapping[str, Any] | None


class RepairKeywords(TypedDict, total=False):
    """`RepairOptions` as keywords, for type checkers."""

    unseen: str
    copy: bool
    overwrite: bool
    hash_source: bool
    dry_run: bool
    verify: bool
    progress: "Progress | None"
    record: Mapping[str, Any] | None


class SaveKeywords(OutputKeywords, total=False):
    """`SaveOptions` as keywords, for type checkers."""

    scheme: "str | Recipe | None"
    ignore: Sequence[str]
    max_shard_bytes: int
    dtype: str | None
    weights: str
    adapter: str | None
    adapter_alpha: float | None
    adapter_base: str | None
    weight_amax: str
    quant_state: bool


def options_from[Options](kind: type[Options], keywords: Mapping[str, Any]) -> Options:
    """The options that keyword arguments say.

    Raises:
        UsageError: an unknown keyword, or a value of another type. One line names the argument, as Python has it.
    """
    from amaxbridge.mappings.errors import UsageError  # late: its package imports torch

    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    for name, value in keywords.items():
        if name not in known:
            near = get_close_matches(name, known, n=1) or get_close_matches(name, _COMMAND_LINE_NAMES, n=1)
            hint = (
                f"did you mean {_COMMAND_LINE_NAMES.get(near[0], near[0])}=?" if near else f"known: {', '.join(known)}"
            )
            raise UsageError(f"unknown argument {name}=; {hint}")
        wanted = _WANTED.get(str(known[name].type))
        if wanted and not wanted[0](value):
            raise UsageError(f"{name}={value!r}: give {wanted[1]}, not {type(value).__name__}")
    return kind(**keywords)


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(each, str) for each in value)


_WANTED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "<class 'bool'>": (lambda value: isinstance(value, bool), "True or False"),
    "<class 'int'>": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a number"),
    "<class 'str'>": (lambda value: isinstance(value, str), "a text"),
    "collections.abc.Sequence[str]": (_is_list_of_text, "a list of names and patterns"),
}
"""An option's type → what tells a value of it, and how to say it. Others are judged where they are used."""


def declared(name: str) -> "Field[Any]":
    """The declaration of an option."""
    return next(each for each in (*fields(SaveOptions), *fields(RepairOptions)) if each.name == name)


def command_line_names() -> dict[str, str]:
    """What Python calls an option → what the command line calls it."""
    known = {each.name: each.metadata[COMMAND_LINE] for each in (*fields(SaveOptions), *fields(RepairOptions))}
    return {name: said for name, said in known.items() if said is not None}


_COMMAND_LINE_NAMES: Mapping[str, str] = {said: name for name, said in command_line_names().items()}
