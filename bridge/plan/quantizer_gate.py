"""The gate for quantizers: every attribute of every ModelOpt quantizer is known here, or the export is refused.

A quantizer is more than its amax. Each of its attributes, enabled or not, live or in a checkpoint, is one of:

- read: what an export writes is made from it;
- without effect on values: statistics, shapes of the last tensor, and what only gradients or ONNX see;
- bound: right with one value, which most quantizers have, and refused with another.

An attribute that is none of these, of a ModelOpt to come, is refused like a wrong value. A disabled quantizer passes
its tensor on, but still multiplies it by `_pre_quant_scale` and rotates it (`TensorQuantizer.forward`). These, and what
replaces the weight itself, also matter where weights are written unquantized: with `scheme=none` and in ignored
modules.

Source: modelopt.torch.quantization, nn.modules.tensor_quantizer and nn.modules.quant_linear, 0.47.0.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from amaxbridge.bridge.live.compressed_weights import packing_of
from amaxbridge.bridge.live.model_walk import ABSENT, Quantizer
from amaxbridge.export.schemes.targets import is_targeted
from amaxbridge.mappings.adapters import is_adapter
from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.names import kind_of, module_of
from amaxbridge.mappings.ranks import Axis, Ranks
from amaxbridge.mappings.registry import MappingRegistry

READ = frozenset((
    "_amax", "_global_amax", "_amax_post", "_amax_pre", "_pre_quant_scale", "_enable_pre_quant_scale", "_num_bits",
    "_axis", "_dynamic", "_disabled", "_use_constant_amax", "_lsq", "_tied_amax", "_quantize_pre_scale",
))  # fmt: skip

WITHOUT_EFFECT: Mapping[str, str] = MappingProxyType({
    "_amax_for_smoothing": "statistics from which calibration made _pre_quant_scale",
    "_amax_shape_for_export": "shape of the last tensor",
    "_bias_axis": "belongs to _bias",
    "_bias_calibrator": "collects statistics",
    "_block_reshape_size": "shape of the last tensor",
    "_calibrator": "collects statistics",
    "_constant_amax": "is in _amax",
    "_effective_bits": "cost of the format, for AutoQuantize",
    "_if_calib": "collects statistics",
    "_input_dtype": "dtype of the last tensor",
    "_is_hf_initialized": "transformers' own mark",
    "_is_nvfp4_static_quantizer": "names the class",
    "_is_static_block_scale_quantizer": "names the class",
    "_learnable_amax": "names the amax that get gradients",
    "_onnx_quantizer_type": "for ONNX",
    "_original_shape": "shape of the last tensor",
    "_padding": "shape of the last tensor; schemes refuse weights that need it",
    "_pass_through_bwd": "for gradients",
    "_pytorch_state_metadata": "shapes of the buffers",
    "_quantizer_cache": "belongs to backend",
    "_shared_quant_tied_attrs": "names the amax that quantizers share",
    "_slices": "shape of the last tensor; schemes refuse weights that need it",
    "_trt_high_precision_dtype": "for ONNX",
    "backend_extra_args": "belongs to backend",
})  # fmt: skip

_CLASSES = {
    "", "TensorQuantizer", "StaticBlockScaleQuantizer", "HardDisabledTensorQuantizer", "SVDQuantTensorQuantizer",
    "NVFP4StaticQuantizer",  # ModelOpt 0.44's name of StaticBlockScaleQuantizer
}  # fmt: skip
_UNKNOWN = "amaxbridge does not know it, so it may change values"
_BLOCK_KEYS = {-1, -2, "type", "scale_bits", "four_over_six"}


@dataclass(frozen=True, slots=True)
class Bound:
    """An attribute with values that an export cannot write.

    Args:
        fits: True if a quantizer computes what an export writes with this value.
        changes: the effect of other values.
        remedy: the next step.
        while_disabled: True if it acts while the quantizer is disabled.
        in_weights: True if it matters even where weights are written unquantized.
    """

    fits: Callable[[Any, Quantizer], bool]
    changes: str
    remedy: str
    while_disabled: bool = False
    in_weights: bool = False


def _is(*values: Any) -> Callable[[Any, Quantizer], bool]:
    return lambda value, _: any(value is each or value == each for each in values)


def _never(value: Any, quantizer: Quantizer) -> bool:
    del value, quantizer
    return False


def _is_false_or_float(value: Any, quantizer: Quantizer) -> bool:
    return not value or not isinstance(quantizer.attributes.get("_num_bits"), int)


def _has_learned_amax_only(value: Any, quantizer: Quantizer) -> bool:
    return bool(value) or not quantizer.attributes.get("_lsq")


def _has_no_rotation(value: Any, quantizer: Quantizer) -> bool:
    del quantizer
    return not (value.get("enable", False) if isinstance(value, dict) else getattr(value, "enable", value))


def _has_known_blocks(value: Any, quantizer: Quantizer) -> bool:
    blocks = value or {}
    if blocks.keys() - _BLOCK_KEYS or blocks.get("type") not in (None, "static", "dynamic"):
        return False
    dynamic = blocks.get("type") == "dynamic"
    if blocks.get("four_over_six") and (dynamic or quantizer.attributes.get("_num_bits") != (2, 1)):
        return False
    return not (dynamic and blocks.get("scale_bits") is None and blocks.get(-1) is not None)


def _multiplies_inputs(value: Any, quantizer: Quantizer) -> bool:
    del value
    return "input_quantizer" in quantizer.name or not quantizer.multiplies_input


def _fits_lsq_bound(value: Any, quantizer: Quantizer) -> bool:
    return not quantizer.attributes.get("_lsq") or value == 6.0


def _is_read_packed(value: Any, quantizer: Quantizer) -> bool:
    del value
    return packing_of(quantizer) is not None


def _is_fake_or_read_packed(value: Any, quantizer: Quantizer) -> bool:
    return value is True or packing_of(quantizer) is not None


def _is_false_or_read_packed(value: Any, quantizer: Quantizer) -> bool:
    return value is False or packing_of(quantizer) is not None


_COMPRESSED = Bound(
    _is_read_packed,
    "the weight itself is stored as codes (mtq.compress) of a format that is not read: NVFP4, FP8 and INT4 are",
    "export the model from before mtq.compress",
    while_disabled=True,
    in_weights=True,
)
_LOW_RANK = Bound(
    _never,
    "SVDQuant adds a low-rank product to the output, which no compressed-tensors engine computes",
    "calibrate with AWQ or without smoothing (algorithm='awq_lite' or 'max') instead",
    while_disabled=True,
    in_weights=True,
)
_CHAIN = Bound(
    _never,
    "weights are rounded several times, to values that codes times scales (W4AFP8) cannot hold; and its engines scale "
    "inputs token by token",
    "calibrate with one INT4 quantizer for weights, and FP8 inputs per token (block_sizes={-1: None}, type='dynamic'), "
    "which scheme=w4afp8 writes; or write these weights unquantized (ignore=)",
)
_AFFINE = Bound(_never, "subtracts a bias before rounding", "calibrate without bias: engines have no affine cache")

BOUND: Mapping[str, Bound] = MappingProxyType(
    {
        "_fake_quant": replace(_COMPRESSED, fits=_is_fake_or_read_packed, while_disabled=False),
        "_dequantize": replace(_COMPRESSED, fits=_is_false_or_read_packed),
        "_scale": _COMPRESSED,
        "_double_scale": _COMPRESSED,
        "_scale_zeros": _COMPRESSED,
        "_svdquant_lora_a": _LOW_RANK,
        "_svdquant_lora_b": _LOW_RANK,
        "_if_quant": Bound(_is(True), "the quantizer is paused, as during calibration", "call its enable_quant()"),
        "_unsigned": Bound(_is_false_or_float, "rounds to unsigned integers", "calibrate with unsigned=False"),
        "_narrow_range": Bound(
            _is_false_or_float, "leaves out the least integer code", "calibrate with narrow_range=False"
        ),
        "_learn_amax": Bound(_is(False), "the amax is learned in a way that ModelOpt removed", "calibrate again"),
        "_bias": Bound(_is(None), _AFFINE.changes, _AFFINE.remedy),
        "_bias_value": _AFFINE,
        "backend": Bound(_is(None), "another program rounds", "set backend to None and calibrate again"),
        "_rotate": Bound(
            _has_no_rotation,
            "a Hadamard transform is applied before rounding",
            "calibrate without rotate: only vLLM has such a transform, for inputs of dense layers at TP=1",
            while_disabled=True,
            in_weights=True,
        ),
        "_block_sizes": Bound(
            _has_known_blocks, "blocks of a kind that no scheme has", "calibrate with blocks of a known scheme"
        ),
        "_quantize_scales": Bound(
            _has_learned_amax_only,
            "learned block scales stay in high precision, but engines hold E4M3",
            "enable LSQ with quantize_scales=True",
        ),
        "_quant_max_bound": Bound(
            _fits_lsq_bound, "learned amax for codes other than E2M1", "enable LSQ for NVFP4 weights only"
        ),
        "_pre_quant_scale": Bound(
            _multiplies_inputs,
            "multiplies the weight or output before rounding",
            "fold it into the weight (ModelOpt does at the end of auto_quantize)",
            while_disabled=True,
            in_weights=True,
        ),
    }
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An attribute that an export cannot write.

    Args:
        quantizer: global Megatron name.
        attribute: name of the attribute, or `class`.
        value: the value, in a few words.
        changes: its effect.
        remedy: the next step.
        in_weights: True if it matters even where weights are written unquantized.
    """

    quantizer: str
    attribute: str
    value: str
    changes: str
    remedy: str
    in_weights: bool


def refusals(quantizers: Iterable[Quantizer]) -> Iterator[Refusal]:
    """Yields every attribute of the quantizers, enabled or not, that an export cannot write."""
    for quantizer in quantizers:
        enabled = quantizer.module.is_enabled
        if is_adapter(quantizer.name):
            if enabled:
                changes, remedy = "rounds inside an adapter", "disable it: no merged weight and no engine computes this"
                yield Refusal(quantizer.name, "enabled", "True", changes, remedy, in_weights=True)
            continue
        if enabled and "output_quantizer" in quantizer.name:
            remedy = "disable it before the export"
            yield Refusal(quantizer.name, "enabled", "True", "rounds outputs, which no engine does", remedy, False)
        if enabled and quantizer.chain:
            yield Refusal(
                quantizer.chain, "class", "SequentialQuantizer", _CHAIN.changes, _CHAIN.remedy, _CHAIN.in_weights
            )
        if quantizer.kind not in _CLASSES:
            remedy = "replace it by a TensorQuantizer, or update amaxbridge"
            yield Refusal(quantizer.name, "class", quantizer.kind, _UNKNOWN, remedy, in_weights=True)
        for name, value in quantizer.attributes.items():
            bound = BOUND.get(name)
            if value is ABSENT and (enabled or name == "_pre_quant_scale" or name not in READ | WITHOUT_EFFECT.keys()):
                changes = "ModelOpt had it in training, but did not save it"
                remedy = "export from the live model (save_hf_pretrained)"
                yield Refusal(quantizer.name, name, "not in the checkpoint", changes, remedy, in_weights=True)
            elif bound is not None:
                if (enabled or bound.while_disabled) and not bound.fits(value, quantizer):
                    yield Refusal(quantizer.name, name, _shown(value), bound.changes, bound.remedy, bound.in_weights)
            elif name not in READ and name not in WITHOUT_EFFECT:
                remedy = "remove it if it has no effect, or update amaxbridge"
                yield Refusal(quantizer.name, name, _shown(value), _UNKNOWN, remedy, in_weights=True)


def check_quantizers_of_ranks(
    found: Iterable[Quantizer], registry: MappingRegistry, ranks: Ranks, ignore: Sequence[str] | None
) -> None:
    """`check_quantizers` for the quantizers of all ranks. Collective.

    Args:
        found: those of this rank.
        ignore: as in `written_plain`.
    """
    reports = ranks.all_gather_object(Axis.WORLD, list(refusals(found)))
    check_quantizers([each for report in reports for each in report], written_plain(registry, ignore))


def written_plain(registry: MappingRegistry, ignore: Sequence[str] | None) -> Callable[[str], bool]:
    """True for the name of a quantizer whose weights are written unquantized.

    Args:
        ignore: modules that are written unquantized; None for all.
    """

    def plain(quantizer: str) -> bool:
        if ignore is None:
            return True
        mapping = registry.megatron_to_hf_lookup(f"{quantizer}._amax")
        return mapping is not None and all(is_targeted(module_of(module_of(name)), ignore) for name in mapping.targets)

    return plain


def check_quantizers(found: Iterable[Refusal], plain: Callable[[str], bool]) -> None:
    """Raises if an export would write anything but what the quantizers compute.

    Args:
        found: refusals of all ranks.
        plain: True for the name of a quantizer whose weights are written unquantized.

    Raises:
        UsageError: names every attribute, its value, its effect and the next step; like quantizers in one line.
    """
    rows: dict[tuple[str, ...], set[str]] = {}
    for each in found:
        if each.in_weights or not plain(each.quantizer):
            key = kind_of(each.quantizer), each.attribute, each.value, each.changes, each.remedy
            rows.setdefault(key, set()).add(each.quantizer)
    if not rows:
        return
    lines = [
        f"\n  {_named(kind, names)}: {attribute}={value}: {changes}\n    next step: {remedy}"
        for (kind, attribute, value, changes, remedy), names in rows.items()
    ]
    count = len({(name, key[1]) for key, names in rows.items() for name in names})
    raise UsageError(
        f"{count} attributes of quantizers change what is computed, and an export cannot write them:{''.join(lines)}"
    )


def _named(kind: str, names: Collection[str]) -> str:
    return next(iter(names)) if len(names) == 1 else f"{kind} ({len(names):,} quantizers)"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    text = f"{value}"
    return text if len(text) <= 80 else f"{text[:77]}…"
