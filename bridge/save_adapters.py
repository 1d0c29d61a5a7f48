"""Saving adapters alone: a plan whose bundles hold nothing else becomes a directory for PEFT."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.plan.adapters import Adapter
from amaxbridge.bridge.plan.export_plan import BundlePlan
from amaxbridge.bridge.plan.tensor_specs import hf_tensors
from amaxbridge.bridge.save import ExportReport, Saver, Stream
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.disk.source_files import SeveralSources
from amaxbridge.export.hub import hub_name
from amaxbridge.export.output.finished_directory import BundleWriter, write_directory
from amaxbridge.export.output.peft_directory import (
    MAMBA_OF_PEFT,
    NAMES_OF_EXPERTS,
    PACKED_BY_PEFT,
    LowRank,
    PeftDirectory,
    adapter_config,
)
from amaxbridge.mappings.errors import MappingError, UsageError, listing
from amaxbridge.mappings.names import is_routed_expert, module_of


def save_adapters(
    hf: HFModel,
    saver: Saver,
    plan: Sequence[BundlePlan],
    adapters: Mapping[str, Adapter],
    stream: Stream,
    source: SeveralSources | None = None,
) -> ExportReport:
    """Writes the adapters of a plan. Collective if the writers are ranks of a live model.

    Args:
        plan: bundles of adapters.
        adapters: Hugging Face module → its adapter.
        stream, source: as in `Saver.save`.

    Raises:
        UsageError: PEFT cannot express some of them; all are named.
        MappingError: adapters do not fit the weights of the model; all are named.
    """
    linears = {module_of(name): tensor for name, tensor in hf_tensors(hf).items() if name.endswith(".weight")}
    misfits = []
    for bundle in plan:
        for name, spec in bundle.specs.items():
            module, _, side = module_of(name).rpartition(".")
            weight, rank = linears.get(module), adapters[module].rank
            rows, columns = weight.shape if weight is not None and weight.ndim == 2 else (None, None)
            wanted = {"lora_A": (rank, columns), "lora_B": (rows, rank)}.get(side, (rows,))
            if spec.shape != wanted:
                misfits.append(f"{adapters[module].adapter}: {name} is {spec}, not {list(wanted)}")
    if misfits:
        raise MappingError(f"{len(misfits)} parts of adapters do not fit the model:{listing(misfits)}")
    _check_expressible(hf, linears, adapters)
    made = {module: LowRank(each.rank, each.scale * each.rank, each.has_lengths) for module, each in adapters.items()}
    writers, options = saver.writers, saver.options
    directory = PeftDirectory(
        target=saver.target,
        config=adapter_config(made, linears, hub_name(hf.directory)),
        tensors={bundle.key: bundle.specs for bundle in plan},
        mine=[bundle.key for bundle in plan if bundle.owner == writers.me],
        source=source,
        record=options.record or {},
    )

    def make(done: frozenset[str], writer: BundleWriter) -> None:
        for bundle in stream([bundle for bundle in plan if bundle.key not in done]):
            writer.write(bundle)

    ended = writers.first
    if not options.dry_run:
        ended = write_directory(directory, writers, make, replace(options, verify=False)).ended
    specs = {name: spec for bundle in plan for name, spec in bundle.specs.items()}
    return ExportReport("none", plan, specs, directory.files, {}, [], QuantState(), {}, ended)


def _check_expressible(hf: HFModel, modules: Collection[str], adapters: Mapping[str, Adapter]) -> None:
    """Refuses what PEFT has no form for.

    transformers packs experts in memory, and PEFT turns adapters of single experts into one of the packed tensor, for
    the models in `PACKED_BY_PEFT`: all projections that are fused there at once, of one rank and alpha, without DoRA.
    It takes every module of such a name for an expert's, also those of dense layers and shared experts, and loses them.

    Args:
        modules: every linear module of the model.
    """
    experts = {module: each for module, each in adapters.items() if is_routed_expert(module)}
    has_experts, packs = any(map(is_routed_expert, modules)), hf.config.get("model_type") in PACKED_BY_PEFT
    problems = []
    for module, each in adapters.items():
        if module in experts and not packs:
            problems.append(f"{module}: PEFT has no adapters of single experts for this architecture")
        elif module in experts and each.has_lengths:
            problems.append(f"{module}: experts have no DoRA in PEFT")
        elif module not in experts and has_experts and packs and module.rpartition(".")[2] in NAMES_OF_EXPERTS:
            problems.append(f"{module}: PEFT would take it for a module of experts, because of its name")
        elif hf.config.get("model_type") in MAMBA_OF_PEFT and module.rpartition(".")[2] == "out_proj":
            problems.append(f"{module}: PEFT takes no adapter of it, because kernels read its weight themselves")
        elif not each.has_lengths and any(other.has_lengths for other in adapters.values()):
            problems.append(f"{module}: LoRA beside DoRA")
    if experts and len(experts) < sum(map(is_routed_expert, modules)):
        problems.append("some projections of experts have adapters, and others have none")
    if len({(each.rank, each.scale) for each in experts.values()}) > 1:
        problems.append("the adapters of experts have several ranks or alphas")
    if problems:
        raise UsageError(
            f"PEFT cannot express {len(problems)} adapters:{listing(problems)}\nadapter=merge writes the merged weights"
        )
