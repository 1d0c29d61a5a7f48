"""The state that modules save beside their tensors, `_extra_state`: told apart by kind; only ModelOpt's is used.

    nothing             None, or no bytes   a Transformer Engine module without FP8 state: every norm, most linears
    Transformer Engine  a pickle            recipe, scaling factors and amax history of FP8 training (delayed scaling)
    ModelOpt            a torch.save file   the configuration of the module's quantizers

Transformer Engine's state steers the kernels of training. It says nothing about the weights, which Megatron stores
dequantized, so an export ignores it. Keys: transformer_engine.pytorch.module.base, `get_extra_state`, and
`ops.op`; modelopt.torch.quantization.plugins.megatron, `quant_module_get_extra_state`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from amaxbridge.bridge.live.compressed_weights import Packing
from amaxbridge.bridge.plan.quantizer_gate import WITHOUT_EFFECT
from amaxbridge.bridge.stored.inert_pickle import (
    Made,
    Named,
    NotReadable,
    is_archive,
    names_in,
    read_archive,
    read_pickle,
)
from amaxbridge.mappings.errors import CheckpointError, listing

type Settings = Mapping[str, Mapping[str, Any]]
"""Name of a quantizer in its module → the quantizer's configuration."""

_NONE: Settings = MappingProxyType({})
_QUANTIZERS = "modelopt_quantizer_state"
_PACKED = "modelopt_q_tensor_state"
_MODELOPT = (_QUANTIZERS, _PACKED, "modelopt_real_quantizer_state")
_OWN = "extra_state"  # key of the module's own state in ModelOpt's
_TRANSFORMER_ENGINE = {
    "recipe", "scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd", "extra_fp8_variables",
    "scale_inv_fwd", "scale_inv_bwd", "global_fp8_buffer", "global_fp8_state",  # version 1
}  # fmt: skip
_PASSES = {"forward", "backward"}
_NEEDED = ("_num_bits", "_axis", "_block_sizes")


def quantizer_settings(state: Any, what: str) -> Settings:
    """The configuration of a module's quantizers; empty if it has none.

    Args:
        state: the state in the checkpoint, as bytes or as `inert_pickle` reads them.
        what: name of the state in messages.

    Raises:
        CheckpointError: the state is damaged, or neither ModelOpt's nor Transformer Engine's.
    """
    try:
        state = _unpacked(_unpacked(state))  # a checkpoint's bytes, and a module's bytes in them
    except NotReadable as error:
        raise CheckpointError(f"{what} cannot be read: {error}\nCopy the checkpoint again") from error
    if _is_nothing(state) or _is_transformer_engine(state):
        return _NONE
    if isinstance(state, dict) and not state.keys().isdisjoint(_MODELOPT):
        return _of_modelopt(state, what)
    if isinstance(state, dict) and state.keys() == {_OWN}:  # saved by ModelOpt, without quantizers
        return _NONE
    raise CheckpointError(
        f"{what} is the state of neither ModelOpt nor Transformer Engine: it has {_described(state)}\n"
        "It may change what the module computes. Load the checkpoint with the program that saved it, and export from "
        "the live model (save_hf_pretrained)"
    )


def _unpacked(state: Any) -> Any:
    """Reads state that was serialized into bytes: a byte tensor, or the `BytesIO` of Transformer Engine 1."""
    state = state[0] if isinstance(state, list) and len(state) == 1 else state
    match state:
        case Made(by=Named("_io", "BytesIO"), state=(bytes() as data, *_)):
            state = data
    if isinstance(state, bytes) and state:
        return read_archive(state) if is_archive(state) else read_pickle(state)
    return state


def _is_nothing(state: Any) -> bool:
    return state is None or state == b"" or state == {}


def _is_transformer_engine(state: Any) -> bool:
    """True for the FP8 state of a module, or of an operation's two passes."""
    if not isinstance(state, dict) or not state:
        return False
    if state.keys() <= _PASSES:
        return all(_is_transformer_engine(each) for each in state.values())
    return state.keys() <= _TRANSFORMER_ENGINE


def _of_modelopt(state: Mapping[str, Any], what: str) -> Settings:
    more = [key for key in state if key not in (*_MODELOPT, _OWN)]
    if more:
        raise CheckpointError(f"{what}: ModelOpt saved {', '.join(map(str, more))} here, which is unknown")
    if (packed := state.get(_PACKED)) and (kind := _packed_by(packed)) not in set(Packing):
        raise CheckpointError(
            f"{what}: the weight was packed by ModelOpt (mtq.compress) as {kind}, and {', '.join(Packing)} are read\n"
            "Export a checkpoint that was saved before"
        )
    settings = state.get(_QUANTIZERS) or {}
    if not isinstance(settings, dict) or not all(isinstance(each, dict) for each in settings.values()):
        raise CheckpointError(f"{what}: a quantizer configuration is not plain data: it has {_described(settings)}")
    settings = {name: _without_statistics(setting) for name, setting in settings.items()}
    foreign = [
        f"{name}.{attribute}: {', '.join(str(each)[:80] for each in list(found)[:8])}"
        for name, setting in settings.items()
        for attribute, value in setting.items()
        if (found := list(names_in(value)))
    ]
    if foreign:
        raise CheckpointError(
            f"{what}: {len(foreign)} quantizer settings are not plain data:{listing(foreign)}\n"
            "Load the checkpoint with the ModelOpt that saved it, and export from the live model (save_hf_pretrained)"
        )
    incomplete = [name for name, setting in settings.items() if not _is_complete(name, setting)]
    if incomplete:
        raise CheckpointError(f"{what}: quantizers without a complete configuration:{listing(incomplete)}")
    return settings


def _packed_by(state: Any) -> str:
    """The name of the class that packed a weight."""
    metadata = state.get("metadata") if isinstance(state, dict) else None
    kind = metadata.get("qtensor_class") if isinstance(metadata, dict) else None
    return kind.name if isinstance(kind, Named) and kind.module.startswith("modelopt.") else "an unknown class"


def _without_statistics(setting: Mapping[str, Any]) -> dict[str, Any]:
    """A quantizer's configuration without the tensors that calibration left there, which have no effect."""
    return {name: value for name, value in setting.items() if name not in WITHOUT_EFFECT or not any(names_in(value))}


def _is_complete(name: Any, setting: Any) -> bool:
    if not isinstance(name, str) or not isinstance(setting, dict) or "_disabled" not in setting:
        return False
    return bool(setting["_disabled"]) or all(key in setting for key in _NEEDED)


def _described(state: Any) -> str:
    """A description of a state, of bounded length."""
    keys = ", ".join(str(key)[:80] for key in list(state)[:8]) if isinstance(state, dict) else type(state).__name__
    names = list(names_in(state))
    return f"{keys or 'nothing'}" + (f", and objects of {', '.join(name[:80] for name in names[:8])}" if names else "")
