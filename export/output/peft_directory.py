"""Adapters alone, as a directory that PEFT loads, and engines that take PEFT's: two files, and a card.

Tensors have PEFT's names, `base_model.model.` before the module's. Modules are targeted by the last part of their names
where all modules of that name have adapters, and else by their names from the layer on. Where ranks or alphas differ,
PEFT's patterns say so.

Source: peft.LoraConfig and peft.utils.save_and_load, 0.21.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amaxbridge.export.disk.row_chunks import Written
from amaxbridge.export.disk.shard_layout import Layout, Shard
from amaxbridge.export.disk.source_files import SeveralSources
from amaxbridge.export.disk.staging import StagedDirectory, plan_fingerprint
from amaxbridge.export.output.config_and_index import CARD_FILE, json_bytes
from amaxbridge.export.output.finalizer import Bundle
from amaxbridge.export.output.finished_directory import BundleSize
from amaxbridge.export.output.provenance import MADE_FROM, RECORD_FILE, versions
from amaxbridge.mappings.names import is_routed_expert
from amaxbridge.mappings.tensors import TensorSpec

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
PACKED_BY_PEFT = frozenset({
    "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "minimax",
    "minimax_m2", "mixtral", "olmoe", "qwen3_moe", "qwen3_next", "solar_open",
})  # fmt: skip
"""The `model_type` of models whose experts PEFT 0.21 packs: keys of `_MODEL_TO_CONVERSION_PATTERN`."""

MAMBA_OF_PEFT = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""The `model_type` of models in which PEFT refuses `out_proj`: `_check_lora_target_modules_mamba`."""

NAMES_OF_EXPERTS = frozenset({"gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3"})
"""Module names that PEFT takes for those of experts in these models: `_MOE_TARGET_MODULE_MAPPING`."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """The adapter of one module.

    Args:
        rank: rows of A.
        alpha: what B · A is multiplied by, times the rank.
        has_lengths: True for DoRA.
    """

    rank: int
    alpha: float
    has_lengths: bool


def adapter_config(adapters: Mapping[str, LowRank], modules: Iterable[str], base: str | None) -> dict[str, Any]:
    """adapter_config.json.

    Args:
        adapters: module → its adapter.
        modules: every linear module of the model.
        base: name of the model that they belong to, None if unknown.
    """
    experts = [each for module, each in adapters.items() if is_routed_expert(module)]  # PEFT knows no patterns for them
    usual, alpha = Counter((each.rank, each.alpha) for each in experts or adapters.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": usual,
        "lora_alpha": _number(alpha),
        "rank_pattern": {_of_layer(module): each.rank for module, each in adapters.items() if each.rank != usual},
        "alpha_pattern": {
            _of_layer(module): _number(each.alpha) for module, each in adapters.items() if each.alpha != alpha
        },
        "target_modules": _targets(adapters, modules),
        "use_dora": any(each.has_lengths for each in adapters.values()),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _targets(adapters: Mapping[str, LowRank], modules: Iterable[str]) -> list[str]:
    ends = {module.rpartition(".")[2] for module in adapters}
    plain = {module.rpartition(".")[2] for module in modules if module not in adapters}
    return sorted(map(_of_layer, adapters)) if ends & plain else sorted(ends)


def _of_layer(module: str) -> str:
    """A module's name from its layer on: PEFT compares ends, and transformers may call the beginning otherwise."""
    return module[max(module.find("layers."), 0) :]


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftDirectory:
    """What a directory of adapters will hold: see `PlannedDirectory`.

    Args:
        target: the directory to write.
        config: adapter_config.json.
        tensors: key of a bundle → specs of its tensors, by PEFT's names without the prefix.
        mine: keys of the bundles that this process writes.
        source: what is read; None for a live model.
        record: how it was asked for.
    """

    target: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, TensorSpec]]
    mine: Sequence[str]
    source: SeveralSources | None
    record: Mapping[str, Any]
    packer: None = None
    keeps_state: bool = False

    @property
    def files(self) -> Layout:
        """The one file of tensors."""
        specs = {_PREFIX + name: spec for each in self.tensors.values() for name, spec in each.items()}
        return Layout((Shard.of(WEIGHTS_FILE, specs),))

    @property
    def keys(self) -> list[str]:
        """As `PlannedDirectory.keys`."""
        return [*self.tensors]

    @property
    def sizes(self) -> Mapping[str, BundleSize]:
        """As `PlannedDirectory.sizes`."""
        return {key: BundleSize.of(self.tensors[key]) for key in self.mine}

    @property
    def finalizer(self) -> "PeftDirectory":
        """It writes tensors as they are."""
        return self

    @property
    def nbytes_beside(self) -> int:
        """As `PlannedDirectory.nbytes_beside`."""
        return len(json_bytes(dict(self.config)))

    @property
    def fingerprint(self) -> str | None:
        """As `PlannedDirectory.fingerprint`."""
        if self.source is None:
            return None
        return plan_fingerprint(self.source.fingerprint, json.dumps(self.config), self.files)

    @property
    def made_from(self) -> str | None:
        """As `PlannedDirectory.made_from`."""
        fingerprint = self.fingerprint
        return fingerprint and hashlib.sha256(fingerprint.encode()).hexdigest()

    @property
    def expected(self) -> Callable[[], None]:
        """PEFT's directories are no checkpoints: `verify` has nothing to say of them."""
        return lambda: None

    def finalize_rows(self, bundle: Bundle) -> Iterator[Written]:
        """Every tensor of a bundle under its name in the file."""
        for name, tensor in bundle.tensors.items():
            for first, rows in tensor.parts():
                yield Written(_PREFIX + name, first, rows)

    def write_beside(self, staged: StagedDirectory, made_from: str | None) -> None:
        """adapter_config.json, our record and the card."""
        staged.write_file(CONFIG_FILE, json_bytes(dict(self.config)))
        staged.write_file(RECORD_FILE, json_bytes({**self.record, MADE_FROM: made_from, "versions": versions()}))
        staged.write_file(CARD_FILE, _card(self.config).encode())

    def check_sources(self) -> None:
        """As `PlannedDirectory.check_sources`."""
        if self.source is not None:
            self.source.check_unchanged()


def _card(config: Mapping[str, Any]) -> str:
    kind = "DoRA" if config["use_dora"] else "LoRA"
    base = config["base_model_name_or_path"]
    data = [
        "library_name: peft",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        "tags:",
        "- amaxbridge",
        "- lora",
    ]
    said = f"A {kind} adapter of rank {config['r']}, exported from Megatron by amaxbridge."
    load = '```python\nmodel = PeftModel.from_pretrained(base_model, "PATH_OF_THIS_DIRECTORY")\n```'
    return "\n".join(["---", *data, "---", "", f"# {kind} adapter", "", said, "", load, ""])
