"""From a Hugging Face directory to a Megatron checkpoint: weights, quantizers that match its format, and their amax.

Training can continue from it: the quantizers compute what a serving engine computed with the directory.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from amaxbridge.bridge import megatron
from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.live.collect_amax import quantizer_mapping
from amaxbridge.bridge.live.fill_model import mappings_of
from amaxbridge.bridge.live.model_walk import layer_pattern, walk_all_quantizers, walk_parameters
from amaxbridge.bridge.megatron.build_model import ModelClass
from amaxbridge.bridge.plan.whole_blocks import ShardedWeight, check_quantizers_blocks
from amaxbridge.bridge.stored.saved_arguments import megatron_arguments
from amaxbridge.export.dequantized import Changed, DequantizedCheckpoint
from amaxbridge.export.disk.output_place import resolved_output
from amaxbridge.export.disk.shard_layout import Layout
from amaxbridge.export.disk.source_files import SourceFiles
from amaxbridge.export.disk.staging import StagedDirectory, check_output
from amaxbridge.export.output.config_and_index import Companions
from amaxbridge.export.output.writing_processes import Together
from amaxbridge.export.schemes import Scheme
from amaxbridge.mappings.amax import INPUT_QUANTIZER, WEIGHT_QUANTIZER
from amaxbridge.mappings.errors import MappingError, UsageError, listing
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.names import kind_of
from amaxbridge.mappings.ranks import Axis, Ranks

_CACHE_SCALES = (".k_scale", ".v_scale")
_log = logging.getLogger("amaxbridge")


@dataclass(frozen=True, slots=True)
class ImportReport:
    """The result of an import, the same on every rank.

    Args:
        schemes: scheme → number of its Hugging Face modules.
        quantizers: number of quantized modules and key-value cache amax in Megatron, over all ranks.
        left: quantized modules of the directory that are unquantized now: no quantizers of ModelOpt compute what
            they did.
        changed: module whose original bytes re-quantizing will not reproduce → the difference.
        cache_scales: key-value cache scales that are dropped: Megatron has no quantizers for them, or their format is
            unknown.
        rounded: tensors that the model holds in a narrower dtype than the directory → both dtypes, `F32 to BF16`.
    """

    schemes: Mapping[str, int]
    quantizers: int
    left: Sequence[str]
    changed: Mapping[str, Changed]
    cache_scales: Sequence[str]
    rounded: Mapping[str, str] = field(default_factory=dict)


def import_hf(
    hf: HFModel,
    target: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    model_class: str | None = None,
    overwrite: bool = False,
    hash_source: bool = False,
) -> ImportReport:
    """Writes a Megatron checkpoint of the model at the parallel sizes of Megatron's parallel state. Collective.

    Nothing appears at `target` before everything is written.

    Args:
        hash_source: as in `OutputOptions`.

    Raises:
        UsageError: the output is not empty, Megatron does not compute the model, or ModelOpt lacks quantizers for it
            at these sizes.
        CheckpointError: the directory is incomplete or changed meanwhile, or is not what its config.json says.
        MappingError: modules that form one Megatron weight are quantized differently.
    """
    target = resolved_output(target)
    check_output(target, overwrite=overwrite)
    companions = Companions.of(hf.directory and hf.weights_directory)
    read = [*companions.read, *companions.weights]
    files = None if companions.source is None else SourceFiles.of(companions.source, read, hashed=hash_source)

    def check_unchanged() -> None:
        hf.check_unchanged()
        if files is not None:
            files.check_unchanged()

    hf.family.check_buildable(hf.config)
    ranks = megatron.process_ranks()
    bridge = AutoBridge(hf, ranks)
    with bridge.open_weights() as weights:
        if weights.schemes and dtype == torch.float16:
            raise UsageError("dtype=float16 has too small a range for dequantized weights: use bfloat16")
        chunks = megatron.build_chunks(hf, dtype=dtype, initialize=False, model_class=_model_class(model_class))
        any_quantized = bool(weights.schemes or weights.cache_scales)
        quantized = _insert(chunks, hf, weights) if any_quantized else set[str]()
        _check_blocks(
            chunks, hf, {module: weights.schemes[module] for module in quantized & weights.schemes.keys()}, ranks
        )
        rounded = bridge.load_from(weights, chunks)
        if any_quantized:
            bridge.load_quant_state(chunks, weights.state)
    report = _report(weights, quantized, rounded, ranks)
    arguments = megatron_arguments(hf, chunks[0].config, layer_pattern(chunks))
    writers = Together(ranks)
    with StagedDirectory(target, overwrite=overwrite) as staged:
        writers.open(staged, Layout(()))
        megatron.save_checkpoint(chunks, staged.path, iteration=None, arguments=arguments)
        writers.end(staged, (), check_unchanged)
    return report


def _model_class(name: str | None) -> ModelClass | None:
    if name not in (None, "gpt", "hybrid"):
        raise UsageError(f"unknown model_class={name}; known: gpt, hybrid")
    return name  # type: ignore[return-value]  # mypy does not narrow by a tuple


def _insert(chunks: Sequence[nn.Module], hf: HFModel, weights: DequantizedCheckpoint) -> set[str]:
    """Inserts quantizers, and enables those with state in the directory.

    Returns:
        The quantized modules, and the amax names of key-value caches.
    """
    with megatron.cache_quantizers(wanted=bool(weights.cache_scales)):
        megatron.insert_quantizers(chunks)
    found, problems = set[str](), list[str]()
    for quantizer in walk_all_quantizers(chunks, hf.family.spelling(layer_pattern(chunks))):
        mapping = quantizer_mapping(quantizer, hf.registry)
        if mapping is None:
            continue
        if mapping.targets[0] in weights.cache_scales:
            megatron.enable_quantizer(quantizer.module, weights.cache_format.quantizer)
            found.update(mapping.targets)
        for suffix in (WEIGHT_QUANTIZER, INPUT_QUANTIZER):
            schemes = _schemes(mapping, suffix, weights)
            names = {scheme.name if scheme else "not quantized" for scheme in schemes.values()}
            scheme = next(iter(schemes.values()), None)
            if len(names) > 1:
                problems.append(", ".join(f"{module}: {scheme and scheme.name}" for module, scheme in schemes.items()))
            elif scheme is not None and scheme.weight_quantizer is not None:
                settings = scheme.weight_quantizer if suffix == WEIGHT_QUANTIZER else scheme.input_quantizer
                if settings is not None:
                    megatron.enable_quantizer(quantizer.module, settings)
                found |= schemes.keys()
    if problems:
        raise MappingError(f"Megatron fuses modules that are quantized differently:{listing(problems)}")
    return found


def _check_blocks(chunks: Sequence[nn.Module], hf: HFModel, schemes: Mapping[str, Scheme], ranks: Ranks) -> None:
    """Refuses parallel sizes that cut the blocks of modules with quantizers, on any rank."""
    parameters = list(walk_parameters(chunks, hf.family.spelling(layer_pattern(chunks))))
    sharded = (
        ShardedWeight(
            mapping, tuple(parameter.tensor.shape), 1 if mapping.shard_dim is None else ranks.size(mapping.axis)
        )
        for parameter, mapping in zip(parameters, mappings_of(parameters, hf.registry), strict=True)
    )
    check_quantizers_blocks(sharded, schemes, hf.model_config)


def _schemes(mapping: MegatronParamMapping, suffix: str, weights: DequantizedCheckpoint) -> dict[str, Scheme | None]:
    """The scheme of each module whose weights or inputs the quantizer covers."""
    modules = [name.removesuffix(suffix) for name in mapping.targets if name.endswith(suffix)]
    return {module: weights.schemes.get(module) for module in modules}


def _report(
    weights: DequantizedCheckpoint, quantized: set[str], rounded: Mapping[str, str], ranks: Ranks
) -> ImportReport:
    """The report of all ranks; the first rank logs its warnings."""
    gathered = ranks.all_gather_object(Axis.WORLD, (quantized, weights.changed, rounded))
    found = {module for modules, _, _ in gathered for module in modules}
    changed = {module: what for _, changes, _ in gathered for module, what in sorted(changes.items())}
    of_all = {name: what for _, _, each in gathered for name, what in sorted(each.items())}
    schemes: dict[str, int] = {}
    for scheme in weights.schemes.values():
        schemes[scheme.name] = schemes.get(scheme.name, 0) + 1
    left = [*(module for module in weights.schemes if module not in found), *weights.dequantized]
    taken = {scale for amax, scale in weights.cache_scales.items() if amax in found}
    scales = [name for name in weights.checkpoint.weight_map if name.endswith(_CACHE_SCALES) and name not in taken]
    report = ImportReport(schemes, len(found), left, changed, scales, of_all)
    if ranks.rank(Axis.WORLD) == 0:
        _warn(report)
    return report


def _warn(report: ImportReport) -> None:
    if report.left:
        _log.warning(
            "%d quantized modules are now unquantized: no quantizers of ModelOpt compute what they did:%s",
            len(report.left),
            listing(report.left),
        )
    if report.cache_scales:
        _log.warning(
            "%d scales of a key-value cache stay behind: the model has no quantizers for them, or their format is "
            "unknown:%s",
            len(report.cache_scales),
            listing(report.cache_scales),
        )
    if report.rounded:
        kinds = Counter(f"{kind_of(name)}: {what}" for name, what in report.rounded.items())
        _log.warning(
            "%d tensors are rounded, since the model is in a narrower dtype (model.dtype=float32 keeps them):%s",
            len(report.rounded),
            listing(f"{kind} ({count})" for kind, count in kinds.items()),
        )
    if report.changed:
        rows = [f"{module}: {what}" for module, what in report.changed.items()]
        _log.warning(
            "Re-quantizing %d weights will not reproduce the original bytes: no ModelOpt amax yields these scales:%s",
            len(rows),
            listing(rows),
        )
