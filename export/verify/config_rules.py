"""Rules about `quantization_config` in config.json, apart from what its targets hit: see `target_rules`."""

from collections.abc import Iterator, Mapping

from amaxbridge.export.modelopt_config import HF_QUANT_CONFIG_FILE
from amaxbridge.export.quant_config import read_quant_config
from amaxbridge.export.schemes import FORMATS, MODELOPT_FORMAT
from amaxbridge.export.schemes.targets import EVERY_LINEAR, is_sound
from amaxbridge.export.verify.checkpoint_view import CheckpointView
from amaxbridge.export.verify.finding import Problem, Rule, Severity

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
    elif raw and raw.get("quant_method") not in FORMATS:
        yield Problem("quant_method", f"is {raw.get('quant_method')!r}, not {' or '.join(map(repr, FORMATS))}")
    elif raw and not view.quantization.groups:
        yield Problem("config_groups", "has no groups")
    if raw and not view.quantized and view.tensors:  # without a tensor, the files are what is wrong
        yield Problem("quantization_config", "is there, and no module is quantized")


def _keys(view: CheckpointView) -> Iterator[Problem]:
    for key in view.quantization.unknown_keys:
        yield Problem(key, f"is no key of {view.quantization.method}")


def _beside(view: CheckpointView) -> Iterator[Problem]:
    """ModelOpt says everything twice; TensorRT-LLM reads the file, vLLM and SGLang config.json."""
    said, raw = view.hf_quant_config.get("quantization"), view.config.get("quantization_config")
    if view.hf_quant_config and not isinstance(said, dict):
        yield Problem(HF_QUANT_CONFIG_FILE, "has no quantization")
    elif isinstance(said, dict) and raw:
        if view.quantization.method != MODELOPT_FORMAT:
            yield Problem(HF_QUANT_CONFIG_FILE, f"is ModelOpt's, and config.json says {view.quantization.method}")
            return
        other = read_quant_config({**said, "quant_method": MODELOPT_FORMAT})
        kinds = [[(group.targets, group.signature) for group in each.groups] for each in (other, view.quantization)]
        differ = {
            "quant_algo": kinds[0] != kinds[1],
            "exclude_modules": set(other.ignore) != set(view.quantization.ignore),
            "kv_cache_quant_algo": other.kv_cache != view.quantization.kv_cache,
        }
        for key in (key for key, unequal in differ.items() if unequal):
            yield Problem(f"{HF_QUANT_CONFIG_FILE}: {key}", "is not what config.json says")


def _gated(view: CheckpointView) -> Iterator[Problem]:
    for where, found in view.quantization.arguments():
        for key in sorted(found.keys() & _GATED.keys()):
            if found[key] is not None:
                yield Problem(f"{where}.{key}", _GATED[key])


def _group_names(view: CheckpointView) -> Iterator[Problem]:
    for number, group in enumerate(view.quantization.groups):
        if group.name != f"group_{number}":
            yield Problem(f"config_groups.{group.name}", f"must be called group_{number}")


def _formats(view: CheckpointView) -> Iterator[Problem]:
    """Older programs write one format for all groups, which engines then take for each."""
    groups, overall = view.quantization.groups, view.quantization.format or None
    for group in groups:
        found = group.format or overall
        if found is None:
            yield Problem(f"{group.name}.format", "is not there")
        elif group.scheme is not None and found != group.scheme.config_group["format"]:
            right = group.scheme.config_group["format"]
            yield Problem(f"{group.name}.format", f"is {found!r}; {group.scheme.name} is stored as {right!r}")
    formats = {group.format or overall for group in groups}
    right = next(iter(formats)) if len(formats) == 1 else "mixed-precision"
    if groups and overall != right:
        yield Problem("format", f"is {overall!r}, must be {right!r}")


def _schemes(view: CheckpointView) -> Iterator[Problem]:
    for fault in view.quantization.faults:
        if fault.where != "quant_method":  # which has a rule of its own
            yield Problem(fault.where, fault.what)
    for group in view.quantization.groups:
        if group.signature is not None and group.scheme is None:
            yield Problem(f"config_groups.{group.name}", f"is of no scheme that is known here: {group.signature}")


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
            yield Problem(f"{where}: {target}", "is no regular expression, or one that takes too long to match")


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
        "quantization_config has no keys that its format does not know",
        "does not load: unknown keys are refused",
        "Remove the keys",
        _keys,
    ),
    Rule(
        "two-configs",
        "hf_quant_config.json and config.json say the same",
        "engines read one or the other: TensorRT-LLM the file, vLLM and SGLang config.json",
        "Export again, or correct the one that does not say what the tensors are",
        _beside,
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
