"""Whose rounding is reproduced."""

from enum import StrEnum


class Arithmetic(StrEnum):
    """The program whose bytes a kernel makes. Every kernel module says what its two differ in."""

    MODELOPT = "modelopt"
    """ModelOpt's quantizers, fp32 throughout: what training computed. For weights that were calibrated."""
    COMPRESSED_TENSORS = "compressed_tensors"
    """llm-compressor's `model_free_ptq`, in the weight's own dtype. For weights that were not calibrated."""
