"""`quant_state.safetensors`: the quantizer state of a model in a file of its own, beside a checkpoint.

Its tensors are the amax, by Hugging Face quantizer name. The rest of a `QuantState`, and the identity of its model, are
JSON in the file's metadata, so that one small read tells if the file fits a checkpoint.

The file is planned like a shard, from names and shapes alone. Per-channel and per-block amax are spread over the ranks
with
the modules that they own: each rank writes its own at their places, and none holds the state of the whole model.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor, uint8

from amaxbridge.export.amax.quant_state import Divergence, QuantState
from amaxbridge.export.disk.safetensors_file import SafetensorsFile
from amaxbridge.export.disk.shard_layout import Shard
from amaxbridge.export.disk.strict_json import NotStrictJson, misfit, parse_json_object
from amaxbridge.export.output.config_and_index import QUANT_STATE_FILE
from amaxbridge.mappings.errors import CheckpointError, UsageError, listing
from amaxbridge.mappings.model_config import number_of_experts
from amaxbridge.mappings.names import is_quantizer_state, is_routed_expert, module_of, natural_key
from amaxbridge.mappings.tensors import TensorSpec

_KEY = "amaxbridge.quant_state"
_VERSION = 1
_FORM: dict[str, Any] = {
    "version": int,
    "formats": {str: str},
    "inputs": ({str: str}, None),
    "missing": [str],
    "divergent": {str: [float]},
    "model": {
        "architectures": [str], "layers": (int, None), "hidden_size": (int, None), "experts": int, "modules": str
    },
}  # fmt: skip
_HOW = f"an export writes {QUANT_STATE_FILE} with quant_state=True"

_log = logging.getLogger("amaxbridge")


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The model that a state belongs to. A field is None if config.json does not give it.

    Args:
        architectures: `architectures` of config.json.
        layers: number of layers.
        hidden_size: width of the residual stream.
        experts: routed experts in a layer; 0 in a dense model.
        modules: a hash of the names of all modules with a weight, "" if unknown. Routed experts, which may be packed,
            and the head, which may be tied, do not count. Two checkpoints of one model may differ in it, if one of them
            has layers for multi-token prediction.
    """

    architectures: tuple[str, ...]
    layers: int | None
    hidden_size: int | None
    experts: int
    modules: str

    @classmethod
    def of(cls, config: Mapping[str, Any], tensors: Iterable[str] = ()) -> Self:
        """The identity of a model.

        Args:
            config: content of config.json.
            tensors: the names of all weights; other names are ignored.
        """
        text = config.get("text_config") or config
        weights = {name for name in tensors if name.endswith(".weight") and not is_routed_expert(name)}
        modules = sorted(module_of(name) for name in weights - {"lm_head.weight"})
        return cls(
            tuple(config.get("architectures") or ()),
            text.get("num_hidden_layers"),
            text.get("hidden_size"),
            number_of_experts(text) or 0,
            hashlib.sha256("\n".join(modules).encode()).hexdigest() if modules else "",
        )

    def differences(self, other: Self) -> list[str]:
        """One line for each field in which the two models certainly differ."""
        ours, theirs = asdict(self), asdict(other)
        return [
            f"{name}: {_shown(ours[name])} here, {_shown(theirs[name])} there"
            for name in ours
            if name != "modules" and None not in (ours[name], theirs[name]) and ours[name] != theirs[name]
        ]


def plan_quant_state(state: QuantState, specs: Mapping[str, TensorSpec], model: ModelIdentity) -> Shard:
    """Plans the file, to be written tensor by tensor like any shard.

    Args:
        state: the formats, and the amax that every rank has.
        specs: specs of the per-channel and per-block amax, which are spread over the ranks; other names are ignored.
        model: the model that the state belongs to.
    """
    content = {
        "version": _VERSION,
        "formats": {module: state.formats[module] for module in sorted(state.formats, key=natural_key)},
        **({} if state.inputs is None else {"inputs": dict(sorted(state.inputs.items(), key=_by_name))}),
        "missing": sorted(state.missing),
        "divergent": {name: list(values) for name, values in state.divergent.items()},
        "model": asdict(model),
    }
    held = {name: spec for name, spec in specs.items() if is_quantizer_state(name)}
    held |= {name: TensorSpec.of(amax) for name, amax in state.amax.items()}
    ordered = {name: held[name] for name in sorted(held, key=natural_key)}
    return Shard.of(QUANT_STATE_FILE, ordered, {_KEY: json.dumps(content, separators=(",", ":"))})


def quant_state_bytes(state: QuantState, model: ModelIdentity) -> bytes:
    """The content of the whole file, if one process has all of the state."""
    shard = plan_quant_state(state, {}, model)
    return shard.header + b"".join(_bytes_of(state.amax[name]) for name in shard.specs)


def read_quant_state(file: Path, config: Mapping[str, Any], tensors: Iterable[str] = ()) -> QuantState:
    """Reads a state.

    Args:
        file: the file.
        config: config.json of the checkpoint that it is for.
        tensors: the names of the checkpoint's tensors, if known already.

    Raises:
        UsageError: the file does not exist, is of another kind, or holds the state of another model.
        CheckpointError: the file is damaged.
    """
    with _opened(file) as opened:
        if _KEY not in opened.metadata:
            raise UsageError(
                f"{file} holds no quantizer state: it is a safetensors file without {_KEY} in its metadata; {_HOW}"
            )
        content = _parsed(file, opened.metadata[_KEY])
        _check_model(file, content["model"], ModelIdentity.of(config, tensors))
        amax = {name: stored.read() for name, stored in opened.tensors.items()}
        opened.check_unchanged()
        return QuantState(
            amax,
            content["formats"],
            frozenset(content["missing"]),
            {name: Divergence(*values) for name, values in content["divergent"].items()},
            content.get("inputs"),
        )


def _opened(file: Path) -> SafetensorsFile:
    try:
        return SafetensorsFile(file)
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise UsageError(f"quant_state={file}: no such file; {_HOW}") from error
        raise


def _parsed(file: Path, text: str) -> dict[str, Any]:
    try:
        content = parse_json_object(text)
    except NotStrictJson as error:
        raise CheckpointError(f"{file}: the metadata is damaged: {error}; export it again") from error
    if isinstance(content.get("version"), int) and content["version"] > _VERSION:
        raise UsageError(
            f"{file} has format version {content['version']}, this amaxbridge knows {_VERSION}: update amaxbridge"
        )
    wrong = misfit(content, _FORM)
    if wrong or any(len(two) != 2 for two in content["divergent"].values()):
        raise CheckpointError(f"{file}: the metadata is damaged: {wrong or 'divergent'}; export it again")
    model = {name: content["model"][name] for name in _FORM["model"]}
    content["model"] = ModelIdentity(**{**model, "architectures": tuple(model["architectures"])})
    return content


def _check_model(file: Path, made_for: ModelIdentity, wanted: ModelIdentity) -> None:
    differences = made_for.differences(wanted)
    if differences:
        raise UsageError(
            f"{file} was made for another model (here: the file, there: the checkpoint):{listing(differences)}\n"
            "Give the state of this model"
        )
    if wanted.modules and made_for.modules and wanted.modules != made_for.modules:
        _log.warning(
            "%s: the model it was made of has other modules than the checkpoint, besides the experts (layers for "
            "multi-token prediction, say); modules without quantizers stay as they are",
            file,
        )


def _by_name(item: tuple[str, str]) -> tuple[str | int, ...]:
    return natural_key(item[0])


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().tobytes()


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
