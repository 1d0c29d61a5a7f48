"""The options of every command, with types and defaults. Hydra checks the command line against these."""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class CommonConfig:
    """Options that every command has."""

    debug: bool = False  # show tracebacks


@dataclass
class AmaxConfig:
    """What to do about quantizer state that makes no scale."""

    missing: str = "error"  # error, from_weights, or group_max: from the members of its fused group


@dataclass
class ExportConfig(CommonConfig):
    """Options of scripts/export.py."""

    checkpoint: str = MISSING  # Megatron distributed checkpoint: the training's save directory, or one iter_NNNNNNN
    hf: str = MISSING  # Hugging Face directory or hub name: config.json, tokenizer
    output: str = MISSING  # directory to write
    scheme: str = "nvfp4"  # nvfp4, fp8, …; auto: as the quantizers say; none: plain weights
    overwrite: bool = False  # replace what is at output
    dry_run: bool = False  # show the plan, write nothing
    max_shard_gb: float = 5.0  # largest safetensors file, in 10^9 bytes
    amax: AmaxConfig = field(default_factory=AmaxConfig)


@dataclass
class DemoConfig(CommonConfig):
    """Options of scripts/demo.py."""

    output: str = "demo-output"  # directory for everything the demo makes; replaced
    processes: int = 2  # tensor-parallel ranks


def register() -> None:
    """Makes the schemas known to Hydra under the names that the YAML files use."""
    store = ConfigStore.instance()
    store.store(name="export_schema", node=ExportConfig)
    store.store(name="demo_schema", node=DemoConfig)
