"""Quantizing a Hugging Face checkpoint without a model definition: safetensors in, compressed-tensors out.

Everything is planned and checked on headers alone; then bundles are quantized one by one and written at their places.
Each output file corresponds to a source file; `inverse_weight_maps` says which tensors move between files.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import torch

from amaxbridge.export.amax.fused_group_amax import MissingAmax, MixedGroups, missing_policy, mixed_policy
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.amax.quant_state_file import read_quant_state
from amaxbridge.export.architectures.facts import Architecture, Guess
from amaxbridge.export.disk.input_paths import given_path, refuse_alike
from amaxbridge.export.disk.output_place import resolved_output
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.disk.shard_layout import Layout
from amaxbridge.export.disk.source_files import SourceFiles
from amaxbridge.export.disk.staging import ALONE, check_output
from amaxbridge.export.hub import check_name, commit_of, hub_name, model_directory
from amaxbridge.export.model_free.architecture_of_input import knowledge_of, noted, unknown_architecture
from amaxbridge.export.model_free.converters.chain import ConverterChain
from amaxbridge.export.model_free.converters.protocol import Converter
from amaxbridge.export.model_free.converters.quantized_source import QuantizedSource, check_cache, recognize
from amaxbridge.export.model_free.input_directory import (
    check_apart,
    check_ignored,
    check_targets,
    read_config,
)
from amaxbridge.export.model_free.inverse_weight_maps import InverseWeightMap, build_microscale_inverse_weight_maps
from amaxbridge.export.model_free.pipeline import devices_of, write_bundles
from amaxbridge.export.model_free.shard_plan import ShardPlan, plan_shards
from amaxbridge.export.output.config_and_index import Companions
from amaxbridge.export.output.finalizer import Finalizer
from amaxbridge.export.output.finished_directory import DirectoryPlan, write_directory
from amaxbridge.export.output.model_card import Conversion
from amaxbridge.export.output.nonfinite import FiniteCheck, nonfinite_policy
from amaxbridge.export.output.writing_processes import Apart
from amaxbridge.export.quantization_declared import declared_quantization
from amaxbridge.export.schemes import Recipe, find_scheme
from amaxbridge.mappings.errors import CheckpointError, UsageError, listing
from amaxbridge.mappings.tensors import TensorSpec
from amaxbridge.output_options import OutputKeywords, OutputOptions, options_from

_log = logging.getLogger("amaxbridge")


@dataclass(frozen=True, slots=True)
class ModelFreeReport:
    """What was written, or with `dry_run` would be written.

    Args:
        layout: the output files.
        source_bytes: bytes of all source tensors.
        sources: the source tensors after the converters, with packed experts split; of a module in `kept` whose codes
            are called `weight`, the weight that they hold.
        written: the output tensors.
        quantized: module → the name of its scheme.
        left: modules with an unquantized 2-D weight, embeddings among them.
        kept: those of `quantized` that the source holds so already.
        formats: the formats in which the source is quantized.
        filled: missing amax: quantizer → what filled it.
        bundles: number of bundles.
        resumed: number of bundles that an interrupted run had finished.
    """

    layout: Layout = field(repr=False)
    source_bytes: int
    sources: Mapping[str, TensorSpec] = field(repr=False)
    written: Mapping[str, TensorSpec] = field(repr=False)
    quantized: Mapping[str, str] = field(repr=False)
    left: Sequence[str] = field(repr=False)
    filled: Mapping[str, str] = field(repr=False)
    bundles: int
    kept: Sequence[str] = field(default=(), repr=False)
    formats: Sequence[str] = ()
    resumed: int = 0


def model_free_ptq(
    model_stub: str | Path,
    save_directory: str | Path,
    scheme: Any,
    ignore: Iterable[str] = (),
    max_workers: int = 1,
    device: str | torch.device | Sequence[str | torch.device] | None = None,
    converter: str | Converter | Sequence[Converter] | None = None,
    *,
    quant_state: QuantState | str | Path | None = None,
    architecture: str | None = None,
    revision: str | None = None,
    stream: bool = False,
    **options: Unpack[OutputKeywords],
) -> ModelFreeReport:
    """Quantizes a checkpoint.

    Args:
        model_stub: a directory of safetensors, or the name of a model on the Hub.
        save_directory: the directory to write; nothing appears there until all of it is complete. The next run with the
            same arguments continues an interrupted one.
        scheme: see `find_scheme`.
        ignore: modules to leave unquantized: full names and `re:` patterns. Embeddings, heads, norms, routers and image
            towers are unquantized anyway, unless the scheme targets them by name.
        max_workers: number of threads; each holds one buffer.
        device: device to quantize on; by default all GPUs, or the CPU. Several GPUs share the work.
        converter: what reads a source that is quantized already: the name of a format (`SOURCE_FORMATS`), or one or
            more converters of your own, applied first. None to choose the format from what the source says and holds.
            Modules that are in the scheme asked for already are kept as they are.
        quant_state: amax and formats from training, or a file of them; quantizes the modules that they cover.
        architecture: None for that of config.json; the name of a known one that has the same tensors; or `guess`, to
            take tensors by the names that most models use. The model card then says so.
        revision: branch, tag or commit of a model on the Hub, which `OWNER/MODEL@REVISION` says, too.
        stream: True to fetch the weights of a model on the Hub part by part, and to keep none of them: the disk holds
            the output alone.
        options: `format`, `base_model`, `missing_amax`, `mixed_groups`, `nonfinite`, `overwrite`, `hash_source`,
            `dry_run`, `verify`, `progress`, `record`; see `OutputOptions`.

    Raises:
        UsageError: the arguments cannot work.
        CheckpointError: the source is incomplete or changed meanwhile, or the output would not serve.
        MappingError: weights cannot be quantized, or hold NaN or Inf; they are named.
        AmaxError: amax are missing, zero, negative or not finite; all are named.
        WriteError: the disk is full or fails; what is written is kept for the next run.
    """
    names = ignore if isinstance(ignore, str) else tuple(ignore)
    asked = options_from(OutputOptions, {"scheme": scheme, "ignore": names, **options})
    recipe, missing = find_scheme(scheme, asked.ignore, asked.format), missing_policy(asked.missing_amax)
    mixed = mixed_policy(asked.mixed_groups)
    finite = FiniteCheck(nonfinite_policy(asked.nonfinite))
    check_name("base_model", asked.base_model)
    source = model_directory(model_stub, weights=not stream, revision=revision).absolute()
    target = resolved_output(save_directory)
    check_apart(source, target)
    check_output(target, overwrite=asked.overwrite)
    devices = devices_of(device)
    named, chain = chain_of(converter)
    companions = Companions.of(source)
    files = SourceFiles.of(source, [*companions.read, *companions.weights], hashed=asked.hash_source)
    config = read_config(source)
    knowledge = knowledge_of(config, architecture)
    with _opened(source, stream=stream) as checkpoint:
        declared = declared_quantization(config, source)
        quantized = None if chain else recognize(checkpoint.tensors, declared, wanted=named)
        check_cache(checkpoint.tensors, declared)
        if isinstance(quant_state, str | Path):
            quant_state = read_quant_state(given_path(quant_state), config, checkpoint.tensors)
        plan = _plan(checkpoint, recipe, quant_state, config, knowledge, quantized, chain, missing, mixed)
        if isinstance(knowledge, Guess) and architecture is None and recipe is not None:
            raise UsageError(unknown_architecture(config, source, plan.finalizer))
        plan.finalizer.finite = finite
        check_targets(recipe, plan.modules, tied=bool(config.get("tie_word_embeddings")))
        check_ignored(asked.ignore, {*plan.modules, *plan.finalizer.ignore})
        report = _report(plan, checkpoint, quantized)
        _tell(plan, report, quantized)
        if asked.dry_run:
            return report
        directory = DirectoryPlan(
            target=target,
            companions=companions,
            sources=(files,),
            config=chain.model_config(config) if chain else config,
            made_of=json.dumps(
                [files.fingerprint, named, architecture, *map(_described, chain.converters if chain else ())]
            ),
            conversion=Conversion(
                plan.finalizer,
                plan.layout,
                report.source_bytes,
                quant_state or QuantState(),
                {**(asked.record or {}), **noted(knowledge, config)},
                asked.base_model,
            ),
            keys=[bundle.key for bundle in plan.bundles],
            sizes=plan.sizes,
            expected=lambda: {name: spec.shape for name, spec in report.sources.items()},
        )
        outcome = write_directory(
            directory,
            Apart(ALONE),
            lambda done, writer: write_bundles(plan, writer, done, max_workers, devices=devices),
            asked,
        )
    return replace(report, resumed=outcome.resumed)


def _opened(source: Path, *, stream: bool) -> SafetensorsCheckpoint:
    """The checkpoint of a directory, or of the model on the Hub that the directory is a snapshot of.

    Raises:
        UsageError: it is to be streamed, and is no such snapshot.
    """
    if not stream:
        return SafetensorsCheckpoint(source)
    from amaxbridge.export.model_free.streamed_checkpoint import StreamedCheckpoint  # late: what nobody else needs

    name, commit = hub_name(source), commit_of(source)
    if name is None or commit is None:
        raise UsageError(f"stream= is for a model on the Hub, and {source} is a directory: leave it out")
    return StreamedCheckpoint(source, name, commit)


def _tell(plan: ShardPlan, report: ModelFreeReport, quantized: QuantizedSource | None) -> None:
    """Logs what is unusual about the source."""
    if lonely := plan.incomplete_groups:
        _log.warning("%d fused groups lack a member that other layers have:%s", len(lonely), listing(lonely))
    if quantized is not None:
        _log.info(
            "the source is quantized (%s): %d modules, of which %d are kept as they are",
            ", ".join(quantized.formats),
            len(quantized.weights),
            len(report.kept),
        )


def chain_of(
    converter: str | Converter | Sequence[Converter] | None,
) -> tuple[str | None, ConverterChain | None]:
    """The format that a `converter` argument names, or the converters that it holds.

    Raises:
        UsageError: a name stands beside converters.
    """
    if converter is None or isinstance(converter, str):
        return converter, None
    converters: list[Converter] = [*converter] if isinstance(converter, Sequence) else [converter]
    if any(isinstance(each, str) for each in converters):
        raise UsageError(f"converter={converters}: give one name, or converters, not both")
    return None, ConverterChain(converters) if converters else None


def _described(converter: Converter) -> str:
    """Tells converters apart. Two that print alike have the same settings; others start anew."""
    settings = getattr(converter, "__dict__", converter)
    return f"{type(converter).__module__}.{type(converter).__qualname__} {settings!r}"


def _plan(
    checkpoint: SafetensorsCheckpoint,
    recipe: Recipe | None,
    state: QuantState | None,
    config: Mapping[str, Any],
    knowledge: Architecture | Guess,
    source: QuantizedSource | None,
    chain: ConverterChain | None,
    missing: MissingAmax,
    mixed: MixedGroups,
) -> ShardPlan:
    weight_map = {name: checkpoint.weight_map[name] for name in checkpoint.tensors}
    model_files = {name: str(checkpoint.directory / name) for name in dict.fromkeys(weight_map.values())}
    converters = chain.converters if chain else ()
    partners = source.partners() if source else {}
    maps = _at_the_top(build_microscale_inverse_weight_maps(weight_map, model_files, converters, partners=partners))
    files = {path: checkpoint.file(name) for name, path in model_files.items()}
    return plan_shards(
        maps, files, recipe, state, config, knowledge, source=source, chain=chain, missing=missing, mixed=mixed
    )


def _at_the_top(maps: Mapping[str, InverseWeightMap]) -> dict[str, InverseWeightMap]:
    """Names output files without sub-directories, in which vLLM and SGLang do not look: `a/b` becomes `a-b`."""
    renamed = {name.replace("/", "-"): tensors for name, tensors in maps.items()}
    refuse_alike(renamed, "the index")
    if len(renamed) < len(maps):
        raise CheckpointError(f"the index has files that differ in / and - alone:{listing(maps)}\nRename them")
    return renamed


def _report(plan: ShardPlan, checkpoint: SafetensorsCheckpoint, source: QuantizedSource | None) -> ModelFreeReport:
    finalizer = plan.finalizer
    return ModelFreeReport(
        plan.layout,
        sum(stored.spec.nbytes for stored in checkpoint.tensors.values()),
        {name: spec for bundle in plan.bundles for name, spec in bundle.specs.items()} | dict(_weights(finalizer)),
        finalizer.output_specs,
        finalizer.scheme_names,
        finalizer.left,
        finalizer.filled,
        len(plan.bundles),
        list(finalizer.kept),
        source.formats if source else (),
    )


def _weights(finalizer: Finalizer) -> Iterator[tuple[str, TensorSpec]]:
    """The weights of modules that keep their codes under the name `weight`: two FP4 codes are one byte of it."""
    for module, scheme in finalizer.kept.items():
        codes = finalizer.output_specs[f"{module}.{scheme.codes}"]
        shape = scheme.weight_shape({"weight": codes}) if scheme.codes == "weight" else None
        if shape is not None:
            yield f"{module}.weight", TensorSpec(shape, torch.bfloat16)
