"""Which versions made a checkpoint: kept beside it, with how it was asked for and turned out; see `model_card`."""

from importlib.metadata import PackageNotFoundError, version

RECORD_FILE = "amaxbridge.json"

_PACKAGES = (
    "amaxbridge", "torch", "megatron-core", "nvidia-modelopt", "compressed-tensors", "transformers", "safetensors"
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of the packages that have a part in the output and are installed. None is imported."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
