"""The facts of a report, gathered from the files of a checkpoint.

Findings, and errors against a reference, come from `export.verify`, so that there is one answer to whether a checkpoint
serves. Sizes and amax are read here, from headers and scales.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from amaxbridge.export.amax.amax_from_scales import SharedScale
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.amax.quant_state_file import read_quant_state
from amaxbridge.export.disk.input_paths import given_path
from amaxbridge.export.disk.io_errors import explaining_reads
from amaxbridge.export.disk.source_files import SourceFiles
from amaxbridge.export.hub import reference_path
from amaxbridge.export.output.config_and_index import QUANT_STATE_FILE, read_config_json
from amaxbridge.export.output.module_schemes import unquantized_kinds
from amaxbridge.export.output.provenance import read_record
from amaxbridge.export.progress import Progress
from amaxbridge.export.report.module_place import Place, place_of
from amaxbridge.export.verify import VerifyReport, WeightError, verify
from amaxbridge.export.verify.checkpoint_view import CheckpointView, Module
from amaxbridge.export.verify.verify_report import finite_or_none
from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.names import natural_key

_SATURATED = (1 + 2**-8) ** 2  # an amax read back from a scale was rounded to bf16 up to twice: 2688 / amax, and back

type Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """One quantized module.

    Args:
        name: name of the module.
        place: layer, projection, expert.
        scheme: name of the scheme; "?" if unknown.
        shape: `[out, in]`.
        weight_amax: per-tensor amax of the weight; None if the format has none.
        input_amax: per-tensor amax of the input; None if inputs are not calibrated.
        largest: the largest absolute weight in the reference.
        snr: signal-to-noise ratio of the dequantized weight against the reference, in dB; infinite if exact.
    """

    name: str
    place: Place
    scheme: str
    shape: tuple[int, int]
    weight_amax: float | None = None
    input_amax: float | None = None
    largest: float | None = None
    snr: float | None = None

    @property
    def saturation(self) -> float:
        """The largest weight divided by the amax; 0 if unknown."""
        return self.largest / self.weight_amax if self.largest and self.weight_amax else 0.0

    @property
    def is_saturated(self) -> bool:
        return self.saturation > _SATURATED


@dataclass(frozen=True, slots=True)
class PartSize:
    """Bytes of a part of the model before and after quantization."""

    part: str
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything on a page.

    Args:
        directory: name of the checkpoint's directory.
        config: content of config.json.
        conversion: content of `amaxbridge.json`; {} if there is none.
        modules: quantized modules, in the order of the model.
        parts: sizes of the parts of the model.
        left: name without numbers → how many unquantized matrices have it.
        state: the quantizer state of training, if it is kept.
        serving: findings of the rules, and the parallel sizes at which the checkpoint serves.
        measured: True if there was a reference.
    """

    directory: str
    config: Json
    conversion: Json
    modules: list[ModuleFacts]
    parts: list[PartSize]
    left: dict[str, int]
    state: QuantState | None
    serving: VerifyReport
    measured: bool

    @property
    def has_quantized_cache(self) -> bool:
        """True if config.json says that the key-value cache is quantized."""
        stated = self.config.get("quantization_config")
        return isinstance(stated, dict) and "kv_cache_scheme" in stated

    @property
    def before(self) -> int:
        return sum(part.before for part in self.parts)

    @property
    def after(self) -> int:
        return sum(part.after for part in self.parts)

    @property
    def saturated(self) -> list[ModuleFacts]:
        """Modules with weights beyond their amax, worst first."""
        found = [module for module in self.modules if module.is_saturated]
        return sorted(found, key=lambda module: -module.saturation)


def gather(
    directory: Path,
    reference: Path | None = None,
    quant_state: Path | None = None,
    progress: Progress | None = None,
) -> Facts:
    """Reads a checkpoint for a report.

    Args:
        directory: directory of safetensors with config.json. It need not serve.
        reference: the directory with plain weights that it was made from.
        quant_state: file of quantizer state; by default the one beside the weights.
        progress: receives the progress through the reference's weights.

    Raises:
        UsageError: the directory does not exist, or the state is of another model.
        CheckpointError: a metadata file is not JSON, or a file changed meanwhile.
    """
    if not given_path(directory).is_dir():
        raise UsageError(f"{directory} does not exist: give a local directory")
    with explaining_reads(directory):
        names = [name for name in os.listdir(directory) if name.endswith((".json", ".safetensors"))]
    noted = SourceFiles.of(directory, names)  # the directory is read three times
    config = read_config_json(directory)
    reference = reference and reference_path(reference)
    if reference is not None and not reference.is_dir():
        raise UsageError(f"reference={reference} is not a directory")
    kept = quant_state or directory / QUANT_STATE_FILE
    state = read_quant_state(kept, config) if quant_state or os.path.lexists(kept) else None
    serving = verify(directory, reference=reference, progress=progress)
    errors = {error.module: error for error in serving.errors}
    with CheckpointView(directory) as view:
        quantized = sorted(view.quantized, key=lambda module: natural_key(module.name))
        modules = [_module(module, state, errors.get(module.name)) for module in quantized]
        noted.check_unchanged()
        return Facts(
            directory.resolve().name,
            config,
            read_record(directory) or {},
            modules,
            _parts(view, {module.name: module for module in modules}),
            unquantized_kinds(
                {name: stored.spec for name, stored in view.tensors.items()}, {module.name for module in quantized}
            ),
            state,
            serving,
            reference is not None,
        )


def _module(module: Module, state: QuantState | None, error: WeightError | None) -> ModuleFacts:
    weight_amax, input_amax = _amax_of_scales(module)
    if state is not None:
        weight_amax = _number(state.weight_amax(module.name)) or weight_amax
        input_amax = _number(state.input_amax(module.name)) or input_amax
    return ModuleFacts(
        module.name,
        place_of(module.name),
        module.scheme.name if module.scheme else "?",
        module.shape or (0, 0),
        weight_amax,
        input_amax,
        error.largest if error else None,
        error.snr if error else None,
    )


def _amax_of_scales(module: Module) -> tuple[float | None, float | None]:
    """Per-tensor amax of weight and input, read back from the scales."""

    def read(scale: SharedScale | None) -> float | None:
        stored = module.tensors.get(scale.tensor) if scale else None
        if scale is None or stored is None or not stored.spec.nbytes:
            return None
        values = stored.read().float()
        if not scale.is_divisor:
            return scale.implied(float(values.max()))
        return scale.implied(float(values.min())) if values.min() > 0 else None

    return read(module.group_scale), read(module.input_scale)


def _number(amax: Tensor | None) -> float | None:
    return None if amax is None else float(amax.max())


def _parts(view: CheckpointView, modules: Mapping[str, ModuleFacts]) -> list[PartSize]:
    """Sizes by part of the model. Before quantization, a quantized weight had 16 bits and no scales."""
    before, after = dict[str, int](), dict[str, int]()
    for name, stored in view.tensors.items():
        module, _, suffix = name.rpartition(".")
        part = place_of(module).part
        after[part] = after.get(part, 0) + stored.spec.nbytes
        if module not in modules or suffix == "bias":
            original = stored.spec.nbytes
        else:
            original = 2 * math.prod(modules[module].shape) if suffix in ("weight", "weight_packed") else 0
        before[part] = before.get(part, 0) + original
    return sorted((PartSize(part, before[part], after[part]) for part in after), key=lambda each: -each.before)


def rows_of(facts: Facts) -> Iterator[Json]:
    """Every module as a row of report.json; numbers that JSON cannot represent are null."""
    for module in facts.modules:
        row = asdict(module)
        del row["place"]
        yield {key: finite_or_none(value) if isinstance(value, float) else value for key, value in row.items()}
