"""Rules about what is known of the architecture (`architectures.facts`), whatever quantizing made of it.

Axes of experts come from the fields of config.json, so an expert that was cut along the wrong side is found without a
reference, unless its sides are equal. Nothing of what wrote the checkpoint is asked. Other shapes are held against
those of the reference, or of transformers' model (`expected-names`).
"""

from collections.abc import Iterator

from amaxbridge.export.architectures.facts import Architecture, Role, pattern_of, value_of
from amaxbridge.export.disk.safetensors_file import StoredTensor
from amaxbridge.export.output.finalizer import CACHE_SCALES
from amaxbridge.export.output.provenance import was_guessed
from amaxbridge.export.verify.checkpoint_view import QUANTIZED_SUFFIXES, CheckpointView
from amaxbridge.export.verify.finding import Problem, Rule, Severity
from amaxbridge.mappings.names import module_of

_QUANTIZABLE = (Role.LINEAR, Role.EXPERTS, Role.INPUTS_FIRST, Role.OPAQUE)


def architecture(view: CheckpointView) -> Architecture | None:
    """What is known of the checkpoint's architecture; None if it is unknown, not stated, or was guessed."""
    return None if was_guessed(view.directory) else view.known_architecture


def _unknown(view: CheckpointView) -> Iterator[Problem]:
    named = view.config.get("architectures")
    if named and view.once(architecture) is None:
        why = "was guessed (architecture=guess)" if was_guessed(view.directory) else "is not known"
        yield Problem("architectures", f"{', '.join(map(str, named))} {why}: roles and shapes are not checked")


def _shapes(view: CheckpointView) -> Iterator[Problem]:
    known = view.once(architecture)
    if known is None:
        return
    singles = _expert_shapes(known)
    for module in view.modules.values():
        right = singles.get(pattern_of(f"{module.name}.weight"))
        if right is not None and module.shape is not None and module.shape != right:
            yield Problem(f"{module.name}.weight", f"is {list(module.shape)}, by config.json {list(right)}")
    for name, stored in _unquantized(view):
        if known.packs_experts(name, stored.spec.shape) and (misfit := known.misfits(name, stored.spec.shape)):
            yield Problem(name, misfit.removeprefix(f"{name}: "))


def _expert_shapes(known: Architecture) -> dict[str, tuple[int, int]]:
    """Pattern of a single expert's weight → `[out, in]`, by the facts of the tensor that packs experts."""
    found: dict[str, tuple[int, int]] = {}
    for pattern, fact in known.facts.items():
        sizes = [None if each is None else value_of(each, known.sizes) for each in fact.shape or ()]
        if fact.role is not Role.EXPERTS or len(sizes) != 3 or None in sizes[1:] or not fact.holds:
            continue
        _, first, second = (size or 0 for size in sizes)
        outputs, inputs = (second, first) if fact.inputs_first else (first, second)
        is_transposed = known.inputs_first if fact.inputs_first is None else fact.inputs_first
        shape = (1, inputs, outputs) if is_transposed else (1, outputs, inputs)
        for single in known.experts_in(pattern.replace("*", "0"), shape):
            found[pattern_of(single)] = outputs // len(fact.holds), inputs
    return found


def _accounted(view: CheckpointView) -> Iterator[Problem]:
    known, config = view.once(architecture), view.quantization
    if known is None or not config.raw:
        return
    for name, stored in _unquantized(view):
        fact = known.fact(name)
        if fact is not None and fact.role not in _QUANTIZABLE:
            continue
        singles = known.experts_in(name, stored.spec.shape) if fact is not None else ()
        modules = {module_of(name), name, *map(module_of, singles)}
        if all(config.ignored_by(module) is None for module in modules):
            what = "is in 16 bits" if fact is not None else f"is not known of {known.name}"
            yield Problem(name, f"{what}, {list(stored.spec.shape)}, and nothing in ignore names it")


def _unquantized(view: CheckpointView) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors of two and more dims that are no part of a quantized module, nor scales of the key-value cache."""
    quantized = {module.name for module in view.quantized}
    for name, stored in view.tensors.items():
        owner, _, suffix = name.rpartition(".")
        of_codes = owner in quantized and suffix in {*QUANTIZED_SUFFIXES, "weight"}
        if len(stored.spec.shape) > 1 and not of_codes and not name.endswith(CACHE_SCALES):
            yield name, stored


RULES = (
    Rule(
        "known-architecture",
        "the architecture is one whose tensors are known",
        "it may serve: which modules are routers, towers or experts was guessed by their names",
        "Check these modules by other means",
        _unknown,
        Severity.WARNING,
    ),
    Rule(
        "shapes",
        "every expert has the shape that config.json gives it, outputs first, packed or one by one",
        "does not load, or reads the weight along the wrong side",
        "Export again; if the source has these shapes, its config.json is of another model",
        _shapes,
    ),
    Rule(
        "accounted",
        "every weight of two and more dims is quantized, known to stay in 16 bits, or named in ignore",
        "the engine builds the layer quantized, and does not find codes and scales",
        "Name it in `ignore`, or quantize it",
        _accounted,
    ),
)
