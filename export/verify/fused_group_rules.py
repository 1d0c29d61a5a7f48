"""Rules about fused groups: modules that an engine runs as one GEMM are quantized as one."""

from collections.abc import Callable, Iterator

from amaxbridge.export.amax.amax_from_scales import SharedScale
from amaxbridge.export.verify.checkpoint_view import CheckpointView, Module
from amaxbridge.export.verify.finding import Problem, Rule, Severity
from amaxbridge.mappings.fused_groups import FusedGroup, groups_among


def _formats(view: CheckpointView) -> Iterator[Problem]:
    for group in groups_among(view.modules):
        members = [view.modules[name] for name in group.members]
        treated = {(module.is_quantized, module.group if module.is_quantized else None) for module in members}
        if len(treated) > 1:
            yield Problem(group.primary, "; ".join(f"{module.name} {_treatment(module)}" for module in members))


def _treatment(module: Module) -> str:
    if not module.is_quantized:
        return "not quantized"
    return module.scheme.name if module.scheme else "quantized in no known format"


def _weights(view: CheckpointView) -> Iterator[Problem]:
    yield from _unshared(view, lambda module: module.group_scale)


def _inputs(view: CheckpointView) -> Iterator[Problem]:
    yield from _unshared(view, lambda module: module.input_scale)


def _unshared(view: CheckpointView, scale_of: Callable[[Module], SharedScale | None]) -> Iterator[Problem]:
    """Groups whose members have different numbers. Usable numbers that are equal as floats are equal in bits."""
    for group in groups_among(module.name for module in view.quantized):
        values = _values(view, group, scale_of)
        if len(set(values.values())) > 1:
            found = ", ".join(f"{name.split('.')[-2]} {value:.9g}" for name, value in values.items())
            yield Problem(
                next(iter(values)), f"{found}; off by up to {max(values.values()) / min(values.values()):.3g}"
            )


def _values(
    view: CheckpointView, group: FusedGroup, scale_of: Callable[[Module], SharedScale | None]
) -> dict[str, float]:
    scales = [(name, scale_of(view.modules[name])) for name in group.members]
    names = [f"{name}.{scale.tensor}" for name, scale in scales if scale is not None]
    found = {name: view.numbers.get(name, 0.0) for name in names}
    return {name: value for name, value in found.items() if value > 0}  # unusable numbers have a rule of their own


def _tiles(view: CheckpointView) -> Iterator[Problem]:
    """Layers that the kernels for their scheme have no tile for, the first of each kind."""
    kinds = dict[tuple[str, int, int], Problem]()
    for group in groups_among(module.name for module in view.quantized):
        members = [view.modules[name] for name in group.members]
        tiles = members[0].scheme.kernel_tiles if members[0].scheme else ()
        shapes = [module.shape for module in members if module.shape and tiles]
        if len(shapes) == len(members):
            rows, columns = sum(out for out, _ in shapes), shapes[0][1]
            if not any(rows % out == 0 and columns % into == 0 for out, into in tiles):
                layer = " + ".join(name.rpartition(".")[2] for name in group.members)
                problem = Problem(group.primary, f"{layer} is [{rows}, {columns}]")
                kinds.setdefault((layer, rows, columns), problem)
    yield from kinds.values()


_SHARE = "Quantize the group with one amax, the largest of its members"

RULES = (
    Rule(
        "fused-formats",
        "members of a fused group are quantized alike, or none is",
        "does not load, or the whole group is read in the format of its first member",
        "Target all members of the group, or ignore all",
        _formats,
    ),
    Rule(
        "fused-weight-scales",
        "members of a fused group have one weight scale, bit for bit",
        "vLLM keeps the largest divisor (of experts, the gate's) for all members and only warns; "
        "the others' weights are off by the ratio. SGLang may refuse to load",
        _SHARE,
        _weights,
    ),
    Rule(
        "fused-input-scales",
        "members of a fused group have one input scale, bit for bit",
        "vLLM keeps one of them for the whole group; of FP8 experts it refuses those that differ by more than 1e-5",
        _SHARE,
        _inputs,
    ),
    Rule(
        "marlin-tiles",
        "W4A16 layers, members of a fused group together, are [out, in] with out divisible by 64 and in by 128, or by "
        "128 and 64",
        "vLLM (read in 0.32) pads the layer, and its inputs in each forward: slower. SGLang (read, not run) and older "
        "vLLM have no kernel for it",
        "Serve it with vLLM; for others take another scheme, or ignore these modules",
        _tiles,
        Severity.WARNING,
    ),
)
