"""From Hugging Face tensors and a quantizer state to a compressed-tensors checkpoint. Knows no ranks and no Megatron.

The founding functions are here by name; each comes from its module when it is asked for, since torch takes a second.
"""

from importlib import import_module
from typing import Any

_PLACES = {
    "build_microscale_inverse_weight_maps": "export.inverse_maps",
    "model_free_ptq": "export.model_free",
    "process_file": "export.single_files",
    "process_file_microscale_scheme": "export.single_files",
    "split_fused_moe_experts": "export.packed_experts",
    "validate_file": "export.single_files",
}

__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'export' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]
