"""From Hugging Face tensors and a quantizer state to a compressed-tensors checkpoint. Knows no ranks and no Megatron.

The founding functions are here by name; each comes from its module when it is asked for, since torch takes a second.
"""

from importlib import import_module
from typing import Any

_PLACES = {
    "build_microscale_inverse_weight_maps": "model_free.inverse_weight_maps",
    "model_free_ptq": "model_free.whole_directory",
    "process_file": "model_free.per_file",
    "process_file_microscale_scheme": "model_free.per_file",
    "split_fused_moe_experts": "disk.packed_experts",
    "validate_file": "model_free.per_file",
}

__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]
