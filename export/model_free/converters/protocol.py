"""The protocol of converters: what compressed-tensors calls a `Converter`, and all of it.

Its own (`compressed_tensors.entrypoints.convert`) and anybody's can be given as `converter=`. A converter may
dequantize what it takes, translate it into a format of compressed-tensors, or change the model (prune experts, say).
"""

from typing import Any, Protocol

from torch import Tensor


class Converter(Protocol):
    """Converts a checkpoint's tensors before they are quantized.

    Only `process` and `get_dependencies` are needed. Where the others are missing, `validate` is `process`, and the two
    configs stay as they are.
    """

    def process(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The converted tensors; `tensors` holds everything that `get_dependencies` asked for, and may be changed."""

    def validate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Raises if `process` could not do its work on these tensors, which are on the meta device.

        May return what `process` will return, or None. Names are trusted; shapes are taken from `process`.
        """

    def get_dependencies(self, weight_name: str) -> set[str]:
        """The other tensors that are needed to convert this one."""

    def update_config(self, config: Any) -> Any:
        """The `QuantizationConfig` of what `process` returns; None if it is not quantized.

        Args:
            config: that of the source, or of the converter before; None if it is not of compressed-tensors.
        """

    def update_model_config(self, model_config: dict[str, Any]) -> dict[str, Any]:
        """The config.json of what `process` returns, apart from its quantization."""
