"""Rules about `quantization_config` in config.json, apart from what its targets hit: see `matching`."""

from collections.abc import Iterator, Mapping
from typing import Any

from amaxbridge.export.schemes.recipe import EVERY_LINEAR
from amaxbridge.export.verify.checkpoint_view import CheckpointView
from amaxbridge.export.verify.finding import Problem, Rule, Severity
from amaxbridge.export.verify.stored_config import is_sound

_KEYS = frozenset(
    (
        "quant_method", "format", "quantization_status", "config_groups", "ignore", "kv_cache_scheme",
        "global_compression_ratio", "sparsity_config", "transform_config", "version",
    )
)  # fmt: skip
_GROUP_KEYS = frozenset(("targets", "weights", "input_activations", "output_activations", "format"))
_ARGUMENT_KEYS = frozenset(
    (
        "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder",
        "observer", "observer_kwargs", "scale_dtype", "zp_dtype",
    )
)  # fmt: skip
_OLD_KEY = "compression_config"
_GATED: Mapping[str, str] = {
    "scale_dtype": "vLLM 0.10.2 to 0.13 refuse it",
    "zp_dtype": "vLLM 0.10.2 to 0.13 refuse it",
}


def _present(view: CheckpointView) -> Iterator[Problem]:
    raw = view.quantization.raw
    if view.quantized and not raw:
        old = " under this name, but as compression_config" if _OLD_KEY in view.config else ""
        yield Problem("quantization_config", f"is not there{old}, and {len(view.quantized)} modules are quantized")
    elif raw and raw.get("quant_method") != "compressed-tensors":
        yield Problem("quant_method", f"is {raw.get('quant_method')!r}, not 'compressed-tensors'")
    elif raw and not view.quantization.groups:
        yield Problem("config_groups", "has no groups")
    if raw and not view.quantized and view.tensors:  # without a tensor, the files are what is wrong
        yield Problem("quantization_config", "is there, and no module is quantized")


def _keys(view: CheckpointView) -> Iterator[Problem]:
    for where, found, known in _dictionaries(view):
        for key in sorted(found.keys() - known):
            yield Problem(f"{where}{key}", "is no key of compressed-tensors")


def _gated(view: CheckpointView) -> Iterator[Problem]:
    for where, found, _ in _dictionaries(view):
        for key in sorted(found.keys() & _GATED.keys()):
            if found[key] is not None:
                yield Problem(f"{where}{key}", _GATED[key])


def _dictionaries(view: CheckpointView) -> Iterator[tuple[str, Mapping[str, Any], frozenset[str]]]:
    """Every dictionary of the config: where it is, its content, the keys that are known."""
    raw = view.quantization.raw
    yield "", raw, _KEYS
    entries = raw.get("config_groups")
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if isinstance(entry, dict):
            yield f"{name}.", entry, _GROUP_KEYS
            for part in ("weights", "input_activations", "output_activations"):
                if isinstance(entry.get(part), dict):
                    yield f"{name}.{part}.", entry[part], _ARGUMENT_KEYS
    if isinstance(raw.get("kv_cache_scheme"), dict):
        yield "kv_cache_scheme.", raw["kv_cache_scheme"], _ARGUMENT_KEYS


def _group_names(view: CheckpointView) -> Iterator[Problem]:
    for number, group in enumerate(view.quantization.groups):
        if group.name != f"group_{number}":
            yield Problem(f"config_groups.{group.name}", f"must be called group_{number}")


def _formats(view: CheckpointView) -> Iterator[Problem]:
    groups = view.quantization.groups
    for group in groups:
        if group.format is None:
            yield Problem(f"{group.name}.format", "is not there")
        elif group.scheme is not None and group.format != group.scheme.config_group["format"]:
            right = group.scheme.config_group["format"]
            yield Problem(f"{group.name}.format", f"is {group.format!r}; {group.scheme.name} is stored as {right!r}")
    formats = {group.format for group in groups}
    right = next(iter(formats)) if len(formats) == 1 else "mixed-precision"
    if groups and view.quantization.raw.get("format") != right:
        yield Problem("format", f"is {view.quantization.raw.get('format')!r}, must be {right!r}")


def _schemes(view: CheckpointView) -> Iterator[Problem]:
    for group in view.quantization.groups:
        if group.scheme is None:
            arguments = f"weights {dict(group.weights or {})}, inputs {group.inputs and dict(group.inputs)}"
            yield Problem(f"config_groups.{group.name}", f"is of no scheme that is known here: {arguments}")


def _mixed_targets(view: CheckpointView) -> Iterator[Problem]:
    targets = [(group, target) for group in view.quantization.groups for target in group.targets]
    classes = [target for _, target in targets if _is_class(target)]
    for group, target in targets:
        if classes and not _is_class(target):
            yield Problem(f"{group.name}: {target}", f"is a name, beside the class {classes[0]}")


def _is_class(target: str) -> bool:
    return target == EVERY_LINEAR or ("." not in target and target[:1].isupper())


def _patterns(view: CheckpointView) -> Iterator[Problem]:
    targets = [(group.name, target) for group in view.quantization.groups for target in group.targets]
    for where, target in targets + [("ignore", entry) for entry in view.quantization.ignore]:
        if not is_sound(target):
            yield Problem(f"{where}: {target}", "is no regular expression")


RULES = (
    Rule(
        "quantization-config",
        "config.json says that the checkpoint is quantized if and only if it is",
        "engines look for plain weights where there are codes, or for codes where there are weights",
        "Export again: config.json and the files are of different runs",
        _present,
    ),
    Rule(
        "config-keys",
        "quantization_config has no keys that compressed-tensors does not know",
        "does not load: unknown keys are refused",
        "Remove the keys",
        _keys,
    ),
    Rule(
        "version-gate",
        "quantization_config has no keys that some versions of engines refuse",
        "does not load in those versions; in others it matters to how activations are rounded",
        "Serve with another version, or remove the keys, and know that activations are then rounded otherwise",
        _gated,
        Severity.NOTE,
    ),
    Rule(
        "group-names",
        "config groups are called group_0, group_1, …",
        "readers that look for group_0 do not find it",
        "Rename the groups",
        _group_names,
    ),
    Rule(
        "formats",
        "each group has the format of its scheme; the global one is the same, or mixed-precision for several",
        "the codes are read in another format, or not at all",
        "Correct `format`",
        _formats,
    ),
    Rule(
        "known-schemes",
        "each config group is of a scheme that is known here",
        "it may serve: dtypes, shapes and scales of its modules could not be checked",
        "Check these modules by other means",
        _schemes,
        Severity.WARNING,
    ),
    Rule(
        "mixed-targets",
        "targets are all classes, or all names",
        "which group a module gets differs between engines",
        "Name the modules in all groups",
        _mixed_targets,
    ),
    Rule("patterns", "patterns are regular expressions", "does not load", "Correct the pattern", _patterns),
)
