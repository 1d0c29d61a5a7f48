"""How strongly adapters act: alpha, as training saved it beside a checkpoint, or as the user says.

Megatron-Bridge saves its configuration as `run_config.yaml` in every iteration; its section `peft` has the kind of
adapter, alpha and rank (`dim`). ModelOpt saves its own in `modelopt_state`: patterns of module names with rank and
scale, which is alpha / rank. The rank is in the shapes, too. Nothing in the tensors tells alpha.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from amaxbridge.bridge.stored.inert_pickle import NotReadable, read_archive
from amaxbridge.bridge.stored.open_checkpoint import open_checkpoint
from amaxbridge.export.disk.input_files import read_input
from amaxbridge.mappings.adapters import AdapterTensor
from amaxbridge.mappings.errors import CheckpointError, UsageError
from amaxbridge.mappings.names import is_routed_expert, module_of

RUN_CONFIG = "run_config.yaml"
_MODELOPT_STATE, _COMMON, _COMMON_FILE = "modelopt_state", "common_state/", "common.pt"
_MOST = 16 * 2**20  # bytes
_KINDS = ("LoRA", "VLMLoRA", "DoRA", "CanonicalLoRA")


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What a configuration or the user says of adapters.

    Args:
        alpha: what B · A is multiplied by, times the rank.
        rank: the rank that the configuration says; None if it says none.
        experts_differ: True if the adapters of experts may have another rank (`normalize_moe_lora`).
        is_dora: True for DoRA, None if nothing says it.
        source: where it is said.
    """

    alpha: float
    rank: int | None
    experts_differ: bool
    is_dora: bool | None
    source: str

    def scale_of(self, tensor: AdapterTensor, rank: int, *, has_lengths: bool) -> float:
        """What the product of an adapter is multiplied by.

        Raises:
            CheckpointError: it has another rank or form than its configuration says.
        """
        if self.is_dora is not None and has_lengths != self.is_dora:
            raise CheckpointError(
                f"{tensor.adapter} has {'' if has_lengths else 'no '}lengths (weight_magnitude), but {self.source} "
                f"says {'DoRA' if self.is_dora else 'LoRA'}: they are of two trainings; give the checkpoint "
                f"with its own {RUN_CONFIG}"
            )
        differs = self.rank is not None and rank != self.rank
        if differs and not (self.experts_differ and is_routed_expert(tensor.weight)):
            raise CheckpointError(
                f"{tensor.adapter} has rank {rank}, but {self.source} says dim: {self.rank}: they are of two "
                f"trainings; give the checkpoint with its own {RUN_CONFIG}"
            )
        return self.alpha / rank


@dataclass(frozen=True, slots=True)
class ModelOptSettings:
    """What ModelOpt's configuration says of its adapters.

    Args:
        name: the adapter that it is for.
        patterns: pattern of module names → rank and scale; later ones win.
        alpha: what the user says, to be compared.
        source: where it is said.
    """

    name: str
    patterns: Mapping[str, Mapping[str, Any]]
    alpha: float | None
    source: str

    def scale_of(self, tensor: AdapterTensor, rank: int, *, has_lengths: bool) -> float:
        """As `AdapterSettings.scale_of`.

        Raises:
            CheckpointError: the configuration is for another adapter or rank, or contradicts the user.
        """
        del has_lengths
        module, said = module_of(tensor.weight), dict[str, Any]()
        for pattern, settings in self.patterns.items():
            if fnmatchcase(module, pattern):
                said |= settings
        scale = said.get("scale", 1.0)
        if tensor.label != self.name or not said:
            raise CheckpointError(f"{tensor.adapter} is not in {self.source}, so nothing says how strongly it acts")
        if not isinstance(scale, int | float) or said.get("rank", rank) != rank:
            raise CheckpointError(f"{tensor.adapter} has rank {rank}, but {self.source} says {said}")
        if self.alpha is not None and self.alpha / rank != scale:
            raise CheckpointError(
                f"{tensor.adapter}: adapter.alpha={self.alpha:g} at rank {rank} contradicts {self.source}, where its "
                f"scale is {scale:g}: leave it out"
            )
        return float(scale)


def adapter_settings(directory: Path, alpha: float | None) -> AdapterSettings | ModelOptSettings:
    """The settings of the adapters in an iteration of a checkpoint.

    Args:
        alpha: what the user says; None to read it.

    Raises:
        UsageError: nothing says alpha, or `alpha` is another than the configuration's.
        CheckpointError: the configuration cannot be read, or its kind of adapter is not known.
    """
    if (of_modelopt := _modelopt_settings(directory / _MODELOPT_STATE, alpha)) is not None:
        return of_modelopt
    file = directory / RUN_CONFIG
    section = _peft(file)
    found = section.get("alpha")
    if found is None and alpha is None:
        raise UsageError(
            f"nothing says how strongly the adapters of {directory} act: there is no {RUN_CONFIG} with peft.alpha in "
            "it. Give adapter.alpha="
        )
    if alpha is not None and found is not None and alpha != found:
        raise UsageError(f"adapter.alpha={alpha:g} contradicts {file}, whose peft.alpha is {found:g}: leave it out")
    said = found if alpha is None else alpha
    if not isinstance(said, int | float) or isinstance(said, bool) or not 0 < said < float("inf"):
        raise UsageError(f"alpha of adapters is {said!r}: it must be a positive number")
    source, dora = (str(file), _kind(section) == "DoRA") if section else ("adapter.alpha", None)
    return AdapterSettings(float(said), section.get("dim"), bool(section.get("normalize_moe_lora")), dora, source)


def pretrained_checkpoint(directory: Path) -> str | None:
    """The checkpoint that the adapters of this iteration were trained on, as their configuration says."""
    checkpoint = _run_config(directory / RUN_CONFIG).get("checkpoint")
    found = checkpoint.get("pretrained_checkpoint") if isinstance(checkpoint, Mapping) else None
    return found if isinstance(found, str) and found else None


def _modelopt_settings(directory: Path, alpha: float | None) -> ModelOptSettings | None:
    """ModelOpt's configuration of adapters, None if it has none."""
    if not directory.is_dir():
        return None
    data = read_input(directory / _COMMON_FILE, directory)
    if data is None:
        opened = open_checkpoint(directory)
        data = next((opened.state(key) for key in opened.states if key.startswith(_COMMON)), None)
    try:
        found = read_archive(data) if isinstance(data, bytes) else data
    except NotReadable as error:
        raise CheckpointError(f"{directory} cannot be read: {error}") from error
    found = found[0] if isinstance(found, list) and found else found
    modes = found.get("modelopt_state_dict") if isinstance(found, Mapping) else None
    for each in modes if isinstance(modes, list) else ():
        match each:
            case ("peft", {"config": {"adapter_name": str() as name, "adapter_cfg": dict() as patterns}}):
                if not all(isinstance(pattern, str) and isinstance(its, dict) for pattern, its in patterns.items()):
                    raise CheckpointError(f"{directory}: the configuration of adapters is not one of patterns")
                return ModelOptSettings(name, patterns, alpha, str(directory))
    return None


def _peft(file: Path) -> Mapping[str, Any]:
    """The section `peft`, empty if there is none."""
    section = _run_config(file).get("peft")
    if section is None:
        return {}
    kind = _kind(section) if isinstance(section, Mapping) else repr(section)
    if not isinstance(section, Mapping) or kind not in _KINDS:
        raise CheckpointError(f"{file}: peft is {kind or 'of no kind'}; known are {', '.join(_KINDS)}")
    for name, wanted in (("alpha", int | float), ("dim", int)):
        value = section.get(name)
        if value is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
            raise CheckpointError(f"{file}: peft.{name} is {value!r}, not a number")
    return section


def _kind(section: Mapping[str, Any]) -> str:
    return str(section.get("_target_", "")).rpartition(".")[2]


def _run_config(file: Path) -> Mapping[str, Any]:
    data = read_input(file, file.parent, most=_MOST)
    if data is None:
        return {}
    try:
        found = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {str(error).splitlines()[0]}. Copy it again") from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{file} holds no settings. Copy it again")
    return found
