"""Mends of `quantization_config`, apart from targets and `ignore`: its place, its writer, names, formats, keys."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch

from amaxbridge.export.modelopt_config import HF_QUANT_CONFIG_FILE
from amaxbridge.export.output.finalizer import CACHE_SCALES
from amaxbridge.export.repair.edits import Change, Edits, Found, Refusal
from amaxbridge.export.repair.mend import Mend, Unseen
from amaxbridge.export.repair.mended_view import MendedView
from amaxbridge.export.schemes import COMPRESSED_TENSORS
from amaxbridge.export.schemes.scheme import arguments
from amaxbridge.export.verify.checkpoint_view import Module
from amaxbridge.mappings.tensors import TensorSpec

_OLD_KEY = "compression_config"
_EMPTY: tuple[Any, ...] = (None, [], {})
_NUMBER = TensorSpec((1,), torch.float32)


def _is_ours(view: MendedView) -> bool:
    """True for a config of compressed-tensors; ModelOpt's own files say the same twice, and are left as they are."""
    return view.quantization.raw.get("quant_method") == COMPRESSED_TENSORS


def _edits(view: MendedView, quantization: Mapping[str, Any]) -> Edits:
    return Edits(config={**view.config, "quantization_config": quantization})


def _place(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    """`quantization_config` under its old name, or with another program's."""
    raw, old, text = view.quantization.raw, view.config.get(_OLD_KEY), view.config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    if not view.quantized or view.config_problem is not None:
        return
    if not raw and isinstance(old, dict):
        others = {key: value for key, value in view.config.items() if key != _OLD_KEY}
        moved = {**old, "quant_method": COMPRESSED_TENSORS}
        yield from _if_read(view, "quantization_config", f"was called {_OLD_KEY}", others, moved)
    elif not raw and isinstance(inner, dict):
        said = "stands in text_config; it is copied to where every engine looks"
        yield from _if_read(view, "quantization_config", said, view.config, inner)
    elif not raw and "quantization_config" not in view.config:
        yield Refusal("quantization_config", "is not there, and tensors alone do not say how inputs are quantized")
    elif raw and not _is_ours(view) and not all(_is_explained(view, module) for module in view.quantized):
        said = f"{raw.get('quant_method')!r} → {COMPRESSED_TENSORS!r}, which its groups and the tensors are"
        moved = {**raw, "quant_method": COMPRESSED_TENSORS}
        yield from _if_read(view, "quant_method", said, view.config, moved)


def _if_read(
    view: MendedView, subject: str, said: str, others: Mapping[str, Any], quantization: Mapping[str, Any]
) -> Iterator[Found]:
    """The change, if compressed-tensors' groups in it explain every quantized module; else a refusal."""
    edits = Edits(config={**others, "quantization_config": quantization})
    found = view.with_(edits)
    odd = next((module for module in found.quantized if not _is_explained(found, module)), None)
    if found.quantization.faults or not found.quantization.groups:
        yield Refusal(subject, "is not as compressed-tensors writes it; `quantize converter=…` reads other formats")
    elif odd is not None:
        yield Refusal(subject, f"does not explain {odd.name}: {', '.join(sorted(odd.tensors))}")
    else:
        yield Change(subject, said, edits)


def _is_explained(view: MendedView, module: Module) -> bool:
    """True if the module's codes and scales are those of its group's scheme, by name."""
    planned = view.planned(module)
    return bool(planned) and {name for name in planned if not name.startswith("input_")} <= module.tensors.keys()


def _beside(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    """ModelOpt's file beside a config of compressed-tensors that explains every tensor."""
    if view.hf_quant_config and _is_ours(view):
        odd = next((module.name for module in view.quantized if not _is_explained(view, module)), None)
        if odd is None:
            said = "is removed: the tensors are compressed-tensors', as config.json says"
            yield Change(HF_QUANT_CONFIG_FILE, said, Edits(removed=frozenset({HF_QUANT_CONFIG_FILE})))
        else:
            yield Refusal(HF_QUANT_CONFIG_FILE, f"and config.json differ, and {odd} is not as config.json says")


def _group_names(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    raw, groups = view.quantization.raw, view.quantization.groups
    if not _is_ours(view):
        return
    right = {group.name: f"group_{number}" for number, group in enumerate(groups)}
    if all(name == becomes for name, becomes in right.items()) or len(groups) < len(raw["config_groups"]):
        return
    renamed = {**raw, "config_groups": {right[name]: entry for name, entry in raw["config_groups"].items()}}
    for name, becomes in right.items():
        if name != becomes:
            yield Change(f"config_groups.{name}", f"is called {becomes}", _edits(view, renamed))


def _formats(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    """`format` of groups and of all, where the tensors show which one is right."""
    config = view.quantization
    right = {group.name: group.scheme.config_group["format"] for group in config.groups if group.scheme is not None}
    if not config.groups or len(right) < len(config.groups) or not _is_ours(view):
        return
    modules = [module for module in view.quantized if module.scheme is not None]
    if odd := [module.name for module in modules if not _is_explained(view, module)]:
        if any(config.raw["config_groups"][name].get("format") != becomes for name, becomes in right.items()):
            yield Refusal("format", f"is not that of its scheme, and the tensors of {odd[0]} are of neither")
        return
    raw = deepcopy(dict(config.raw))
    formats = set(right.values())
    whole = formats.pop() if len(formats) == 1 else "mixed-precision"
    found: dict[str, tuple[Any, str]] = {}
    for name, becomes in right.items():
        if raw["config_groups"][name].get("format") != becomes:
            found[f"{name}.format"] = raw["config_groups"][name].get("format"), becomes
            raw["config_groups"][name]["format"] = becomes
    if raw.get("format") != whole:
        found["format"] = raw.get("format"), whole
        raw["format"] = whole
    for where, (before, becomes) in found.items():
        yield Change(where, f"{before!r} → {becomes!r}, as the tensors are stored", _edits(view, raw))


def _keys(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    """Unknown keys that say nothing, and the dtype of zero points that symmetric codes do not have."""
    if not _is_ours(view):
        return
    raw = deepcopy(dict(view.quantization.raw))
    removed: dict[str, str] = {}
    every = [*view.quantization.arguments()]
    gated = any(arguments_of.get("scale_dtype") is not None for _, arguments_of in every)  # and so refused anyway
    for where, arguments_of in () if gated else every:
        if arguments_of.get("zp_dtype") is not None and arguments_of.get("symmetric", True) is True:
            removed[f"{where}.zp_dtype"] = "symmetric codes have no zero points; vLLM 0.10.2 to 0.13 refuse the key"
    for key in view.quantization.unknown_keys:
        if _at(raw, key) in _EMPTY:
            removed[key] = "compressed-tensors does not know it, and it says nothing"
        else:
            yield Refusal(key, f"is {_at(raw, key)!r}, no key of compressed-tensors: it may change what tensors mean")
    for key in removed:
        _remove(raw, key)
    for key, why in removed.items():
        yield Change(key, f"is removed: {why}", _edits(view, raw))


def _parents(raw: Any, key: str) -> tuple[Any, str]:
    """The object that has a key given by its path, and the key's own name. A group's name may hold dots."""
    for name, entry in (raw.get("config_groups") or {}).items() if isinstance(raw.get("config_groups"), dict) else ():
        if key.startswith(f"{name}.") and isinstance(entry, dict):
            part, _, rest = key.removeprefix(f"{name}.").partition(".")
            return (entry[part], rest) if rest and isinstance(entry.get(part), dict) else (entry, part)
    part, _, rest = key.partition(".")
    return (raw[part], rest) if rest and isinstance(raw.get(part), dict) else (raw, key)


def _at(raw: Any, key: str) -> Any:
    owner, name = _parents(raw, key)
    return owner.get(name)


def _remove(raw: Any, key: str) -> None:
    owner, name = _parents(raw, key)
    owner.pop(name, None)


def _cache(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    """Scales of the cache without kv_cache_scheme: a number for keys and one for values in each layer is FP8's."""
    raw = view.quantization.raw
    found = {name: stored for name, stored in view.tensors.items() if name.endswith(CACHE_SCALES)}
    if not _is_ours(view) or raw.get("kv_cache_scheme") or not found:
        return
    attentions = {name.rpartition(".")[0] for name in found}
    attentions |= {name.rpartition(".")[0] for name in view.modules if name.endswith(".self_attn.k_proj")}
    lacking = [
        f"{each}{suffix}" for each in sorted(attentions) for suffix in CACHE_SCALES if f"{each}{suffix}" not in found
    ]
    odd = [name for name, stored in found.items() if stored.spec not in (_NUMBER, TensorSpec((), _NUMBER.dtype))]
    if lacking or odd:
        yield Refusal("kv_cache_scheme", f"is not there, and {(lacking + odd)[0]} is missing or no number: not FP8's")
        return
    scheme = arguments(8, "float", "tensor")
    what = f"FP8 with a scale for each layer, as {len(found)} tensors have it"
    yield Change("kv_cache_scheme", what, _edits(view, {**raw, "kv_cache_scheme": scheme}))


MENDS = (
    Mend(
        "config-place",
        ("quantization-config", "quantized-is-targeted"),
        "quantization_config is called compression_config, stands in text_config, or names another program",
        "it is moved or renamed, if its groups explain every quantized module; otherwise refused",
        _place,
    ),
    Mend(
        "two-configs",
        ("two-configs",),
        "hf_quant_config.json of ModelOpt lies beside a config.json of compressed-tensors",
        "the file is removed, if config.json explains every tensor; otherwise refused",
        _beside,
    ),
    Mend(
        "group-names",
        ("group-names",),
        "config groups are not called group_0, group_1, …",
        "they are renamed in their order",
        _group_names,
    ),
    Mend(
        "keys",
        ("config-keys", "version-gate"),
        "keys that compressed-tensors or versions of engines refuse",
        "unknown keys that are null or empty are removed; so is zp_dtype of symmetric codes, where no scale_dtype "
        "stands, which the same versions refuse, and which stays because it decides how activations are rounded; keys "
        "that say something are refused",
        _keys,
    ),
    Mend(
        "formats",
        ("formats",),
        "format is not that of the scheme",
        "the format of the scheme is written, if the tensors are stored so; otherwise refused",
        _formats,
    ),
)
CACHE = (
    Mend(
        "kv-cache-scheme",
        ("kv-scales",),
        "k_scale and v_scale lie in the files, and config.json has no kv_cache_scheme",
        "FP8 for each tensor is written, if every layer has both as one number; otherwise refused",
        _cache,
    ),
)
