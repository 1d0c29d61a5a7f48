"""Quantizing a Hugging Face checkpoint without a model definition: safetensors in, compressed-tensors out.

Everything is planned and checked on headers alone, then bundles are quantized one by one and written at their places.
An output file stands for a source file; see `inverse_maps` for what moves between files.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from export.checkpoint import SafetensorsCheckpoint
from export.finalizer import Bundle
from export.fused_scales import missing_policy
from export.inverse_maps import Converter, build_microscale_inverse_weight_maps
from export.layout import Layout
from export.metadata import CONFIG_FILE, INDEX_FILE, carried_files, config_json, index_json
from export.packed_experts import split_fused_moe_experts
from export.pipeline import Worker, run
from export.progress import NoProgress, Progress
from export.quant_state import QuantState
from export.quant_state_file import read_quant_state
from export.record import RECORD_FILE, record_json
from export.safetensors_file import SafetensorsFile
from export.schemes import find_scheme
from export.schemes.recipe import is_named
from export.shard_plan import ShardPlan, devices_of, plan_shards
from export.source import SourceBundle
from export.writer import ShardWriter, StagedDirectory, check_output, plan_fingerprint
from mappings.errors import UsageError, listing
from mappings.tensors import TensorSpec

__all__ = [
    "Converter",
    "ModelFreeReport",
    "build_microscale_inverse_weight_maps",
    "model_free_ptq",
    "process_file",
    "process_file_microscale_scheme",
    "split_fused_moe_experts",
    "validate_file",
]

_log = logging.getLogger("amaxbridge")


@dataclass(frozen=True, slots=True)
class ModelFreeReport:
    """What was written, or with `dry_run` would be.

    Args:
        layout: the files.
        source_bytes: of all tensors that were read.
        sources: what goes in, after the converters, packed experts one by one.
        written: what comes out.
        quantized: module → the name of its scheme.
        left: modules with a 2-D weight that is written as it is, embeddings among them.
        filled: amax that were missing: quantizer → what filled it.
        resumed: bundles that an interrupted run had left, of `bundles`.
    """

    layout: Layout
    source_bytes: int
    sources: Mapping[str, TensorSpec]
    written: Mapping[str, TensorSpec]
    quantized: Mapping[str, str]
    left: Sequence[str]
    filled: Mapping[str, str]
    bundles: int
    resumed: int = 0


def model_free_ptq(
    model_stub: str | Path,
    save_directory: str | Path,
    scheme: Any,
    ignore: Iterable[str] = (),
    max_workers: int = 1,
    device: str | torch.device | Sequence[str | torch.device] | None = None,
    converter: Converter | Sequence[Converter] | None = None,
    *,
    quant_state: QuantState | str | Path | None = None,
    missing_amax: str = "error",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    record: Mapping[str, Any] | None = None,
) -> ModelFreeReport:
    """Quantizes a checkpoint.

    Args:
        model_stub: a directory of safetensors, or the name of a model on the Hub.
        save_directory: what to write; nothing appears there before all of it is whole. A run that was interrupted is
            taken up by the next one with the same arguments.
        scheme: see `find_scheme`.
        ignore: modules that are left as they are: full names and `re:` patterns. Embeddings, heads, norms, routers and
            towers for images are anyway, unless the scheme targets them by name.
        max_workers: threads; each holds one buffer.
        device: where to quantize; a GPU if there is one. Several GPUs share the work.
        converter: applied first; from another format, say.
        quant_state: amax and formats from training, or a file of them: quantizes what they are of, and leaves the rest.
        missing_amax: what to do about an amax that makes no scale: `error`, `from_weights` or `group_max`.
        overwrite: replace what is at `save_directory`.
        dry_run: plan and check everything, write nothing.
        progress: is told how far it is.
        record: how this was asked for, kept in `amaxbridge.json` with the versions; None for no such file.

    Raises:
        UsageError: arguments that cannot work.
        CheckpointError: the source is not whole.
        MappingError: weights that cannot be quantized, NaN or Inf among them; named.
        AmaxError: amax that are missing, zero, negative or not finite; all are named.
        WriteError: the disk is full; what is written is kept for the next run.
    """
    ignore = tuple(ignore)
    recipe, missing = find_scheme(scheme, ignore), missing_policy(missing_amax)
    source, target = _source_directory(model_stub), Path(save_directory).absolute()
    _check_paths(source, target, overwrite=overwrite)
    converters = _as_sequence(converter)
    config = _read_config(source, converted=bool(converters))
    with SafetensorsCheckpoint(source) as checkpoint:
        weight_map = {name: checkpoint.weight_map[name] for name in checkpoint.tensors}
        model_files = {name: str(source / name) for name in dict.fromkeys(weight_map.values())}
        maps = build_microscale_inverse_weight_maps(weight_map, model_files, converters)
        files = {path: checkpoint.file(name) for name, path in model_files.items()}
        if isinstance(quant_state, str | Path):
            quant_state = read_quant_state(Path(quant_state), config, weight_map)
        plan = plan_shards(maps, files, recipe, quant_state, config, converters, missing)
        _check_ignored(ignore, plan.modules)
        report = ModelFreeReport(
            plan.layout,
            sum(stored.spec.nbytes for stored in checkpoint.tensors.values()),
            {name: spec for bundle in plan.bundles for name, spec in bundle.specs.items()},
            plan.finalizer.output_specs,
            plan.finalizer.scheme_names,
            plan.finalizer.left,
            plan.finalizer.filled,
            len(plan.bundles),
        )
        if plan.incomplete_groups:
            rows = plan.incomplete_groups
            _log.warning("%d fused groups lack a member that other layers have:%s", len(rows), listing(rows))
        if dry_run:
            return report
        fingerprint = plan_fingerprint(_fingerprint(source, model_files), plan.finalizer.fingerprint, plan.layout)
        with StagedDirectory(target, fingerprint) as staged:
            done = staged.open(plan.layout)
            report = replace(report, resumed=len(done))
            _write(plan, staged.path, done, max_workers, devices_of(device), progress or NoProgress())
            for file in carried_files(source):
                staged.write_file(file.name, file.read_bytes())
            staged.write_file(CONFIG_FILE, config_json(config, plan.finalizer.quantization_config))
            if record is not None:
                staged.write_file(RECORD_FILE, record_json(record))
            if (index := index_json(plan.layout)) is not None:
                staged.write_file(INDEX_FILE, index)
            staged.commit()
    return report


def process_file(
    inverse_weight_map: Mapping[str, Sequence[str] | None],
    save_path: str | Path,
    scheme: Any,
    ignore: Iterable[str] = (),
    device: str | torch.device | None = None,
    converter: Converter | None = None,
) -> tuple[int, dict[str, str]]:
    """Quantizes what one output file is made from, and writes the file.

    Args:
        inverse_weight_map: path → the tensors to read from it, None for all; see
            `build_microscale_inverse_weight_maps`. A fused group may be incomplete where it is so in the checkpoint.
        save_path: the file to write, in one move when it is whole.
        scheme, ignore, device, converter: as in `model_free_ptq`.

    Returns:
        Bytes of all tensors, and tensor → file name.
    """
    save_path = Path(save_path).absolute()
    with (
        _file_plan(inverse_weight_map, save_path, scheme, ignore, converter) as plan,
        StagedDirectory(save_path) as staged,
    ):
        staged.open(plan.layout)
        _write(plan, staged.path, frozenset(), 1, devices_of(device)[:1], NoProgress())
        (staged.path / save_path.name).replace(save_path)
    return plan.layout.total_size, plan.layout.weight_map


process_file_microscale_scheme = process_file
"""A scheme without groups is one with groups of one."""


def validate_file(
    inverse_weight_map: Mapping[str, Sequence[str] | None],
    save_path: str | Path,
    scheme: Any,
    ignore: Iterable[str] = (),
    device: str | torch.device | None = None,
    converter: Converter | None = None,
) -> None:
    """Checks, on headers alone, that `process_file` can do its work.

    Raises:
        MappingError: weights that cannot be quantized; all are named.
    """
    with _file_plan(inverse_weight_map, Path(save_path), scheme, ignore, converter):
        pass


@contextmanager
def _file_plan(
    inverse_weight_map: Mapping[str, Sequence[str] | None],
    save_path: Path,
    scheme: Any,
    ignore: Iterable[str],
    converter: Converter | None,
) -> Iterator[ShardPlan]:
    """The plan of one output file, while its sources are open."""
    recipe = find_scheme(scheme, tuple(ignore))
    with ExitStack() as stack:
        files = {str(path): stack.enter_context(SafetensorsFile(Path(path))) for path in inverse_weight_map}
        wanted = {
            str(path): list(files[str(path)].tensors if names is None else names)
            for path, names in inverse_weight_map.items()
        }
        yield plan_shards({save_path.name: wanted}, files, recipe, None, {}, _as_sequence(converter))


def _write(
    plan: ShardPlan,
    directory: Path,
    done: frozenset[str],
    workers: int,
    devices: Sequence[torch.device],
    progress: Progress,
) -> None:
    needed = [bundle for bundle in plan.bundles if bundle.key not in done]
    progress.begin(
        tensors=sum(len(bundle.specs) for bundle in needed),
        nbytes=sum(bundle.nbytes for bundle in plan.bundles),
        kept=sum(bundle.nbytes for bundle in plan.bundles if bundle.key in done),
    )
    writer = ShardWriter(directory, plan.layout)

    def make(bundle: SourceBundle, worker: Worker) -> None:
        tensors = worker.prepare(bundle.load(), plan.finalizer.is_quantized)
        for name, first, rows in plan.finalizer.finalize_rows(Bundle(tensors, plan.block_amax(bundle), bundle.key)):
            writer.write(name, rows, first)
        writer.done(bundle.key)
        progress.advance(tensors=len(bundle.specs), nbytes=bundle.nbytes)

    try:
        run(needed, make, workers=max(1, min(workers, len(needed))), devices=devices)
    finally:
        writer.close()


def _source_directory(model_stub: str | Path) -> Path:
    path = Path(model_stub)
    if not path.exists() and not path.is_absolute() and str(model_stub).count("/") == 1:
        return Path(snapshot_download(str(model_stub)))
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory of safetensors, nor the name of a model on the Hub")
    return path.absolute()


def _check_paths(source: Path, target: Path, *, overwrite: bool) -> None:
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UsageError(f"output {target} and input {source} must not lie in one another: choose another output")
    check_output(target, overwrite=overwrite)


def _read_config(source: Path, *, converted: bool) -> dict[str, Any]:
    """config.json; of a checkpoint that is quantized already only where a converter comes first."""
    file = source / CONFIG_FILE
    if not file.is_file():
        raise UsageError(f"{source} is not a Hugging Face model directory: no {CONFIG_FILE} there")
    try:
        config: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError as error:
        raise UsageError(f"{file} is not valid JSON: {error}") from error
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method and not converted:
        raise UsageError(
            f"{source} is quantized already ({method}): give a converter that dequantizes it, such as those of "
            "compressed_tensors.entrypoints.convert, or the checkpoint that it was made from"
        )
    return config


def _check_ignored(ignore: Sequence[str], modules: Iterable[str]) -> None:
    """An `ignore` that matches nothing is a misspelling, and what it was to spare would be quantized."""
    modules = list(modules)
    idle = [target for target in ignore if not any(is_named(module, [target]) for module in modules)]
    if idle:
        raise UsageError(f"{len(idle)} entries of ignore match no module:{listing(idle)}")


def _fingerprint(source: Path, files: Iterable[str]) -> str:
    """Names the source: a file that was written anew is another."""
    found = [(name, (source / name).stat()) for name in sorted(set(files))]
    return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in found])


def _as_sequence(converter: Converter | Sequence[Converter] | None) -> Sequence[Converter]:
    if converter is None:
        return ()
    return converter if isinstance(converter, Sequence) else (converter,)
