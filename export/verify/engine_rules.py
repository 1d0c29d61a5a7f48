"""Rules about what engines can serve at all, by their tables (`architectures.engine_tables`)."""

from collections.abc import Iterator, Mapping

from amaxbridge.export.amax.cache_scales import cache_format
from amaxbridge.export.architectures.engine_tables import architectures_of
from amaxbridge.export.architectures.engines import ENGINES, RUNTIME
from amaxbridge.export.modelopt_config import MIXED
from amaxbridge.export.schemes.targets import EMBEDDINGS, HEAD
from amaxbridge.export.verify.checkpoint_view import CheckpointView, Module
from amaxbridge.export.verify.engine_readings import build_of, readings
from amaxbridge.export.verify.finding import Problem, Rule, Severity
from amaxbridge.export.verify.name_rules import is_expert
from amaxbridge.export.verify.parallel_sizes import parallel_sizes
from amaxbridge.mappings.families import language_model_of

_WORDS: Mapping[str, str] = {"linear": "dense layers", "experts": "routed experts", "head": "the output layer"}


def _part(module: Module) -> str:
    if is_expert(module.name):
        return "experts"
    return "head" if module.name.endswith(HEAD) else "linear"


def _schemes(view: CheckpointView) -> Iterator[Problem]:
    kinds: dict[tuple[str, str], Module] = {}
    kinds_of_runtime: dict[str, Problem] = {}
    for module in view.quantized:
        if module.scheme is not None:
            kinds.setdefault((module.scheme.served_as, _part(module)), module)
            if module.scheme.plain is not module.scheme:
                what = f"{RUNTIME.label} reads compressed-tensors, not {module.scheme.served_as}"
                kinds_of_runtime.setdefault(module.scheme.served_as, Problem(module.name, what, RUNTIME.key))
    yield from kinds_of_runtime.values()
    yield from _mixed(view)
    for engine in ENGINES:
        assert engine.facts is not None
        for (scheme, part), module in kinds.items():
            said = engine.facts.refusal(scheme, part)
            if said is not None:
                yield Problem(
                    module.name, f"{engine.label} does not serve {scheme} for {_WORDS[part]}: {said}", engine.key
                )


def _mixed(view: CheckpointView) -> Iterator[Problem]:
    """ModelOpt's MIXED_PRECISION, from whose algorithms SGLang guesses which of its own methods it is."""
    algorithms = {group.scheme.stored_as for group in view.quantization.groups if group.scheme is not None}
    for engine in ENGINES if view.quantization.raw.get("quant_algo") == MIXED else ():
        if engine.mixed_needs and not algorithms.intersection(engine.mixed_needs):
            what = f"is {MIXED} without {' or '.join(engine.mixed_needs)}, which {engine.label} takes for w4afp8"
            yield Problem("quant_algo", what, engine.key)


def _built(view: CheckpointView) -> Iterator[Problem]:
    for each in view.once(readings):
        quantized = [name for name in each.at.modules if name in view.modules and view.modules[name].is_quantized]
        if each.unquantized:
            for name in quantized:
                yield Problem(
                    name, f"quantized in the files; {each.engine.label} builds it in 16 bits", each.engine.key
                )
    for engine in ENGINES:
        build = build_of(view, engine)
        for module in view.quantized if build is not None else ():
            is_head, is_embedding = module.name.endswith(HEAD), module.name.endswith(EMBEDDINGS)
            assert build is not None
            if (is_head and not build.head) or (is_embedding and not build.embedding):
                yield Problem(module.name, f"quantized in the files; {engine.label} builds it in 16 bits", engine.key)


def _fused(view: CheckpointView) -> Iterator[Problem]:
    """Layers that an engine fuses beyond the usual groups, whose members are not quantized alike."""
    for each in view.once(readings):
        members = [view.modules[name] for name in each.at.modules if name in view.modules]
        treated = {(module.is_quantized, module.group if module.is_quantized else None) for module in members}
        if len(treated) > 1 and not each.unquantized and not is_expert(members[0].name):
            names = ", ".join(f"{module.name} ({_treatment(module)})" for module in members)
            yield Problem(each.at.path, f"{each.engine.name} fuses {names}", each.engine.key)


def _treatment(module: Module) -> str:
    if not module.is_quantized:
        return "not quantized"
    return module.scheme.name if module.scheme else "quantized in no known format"


def _fits(view: CheckpointView) -> Iterator[Problem]:
    for problem in parallel_sizes(view, (1,))[0].problems:
        if problem.engine:
            yield problem
            continue
        for engine in ENGINES:
            if engine.cuts:
                yield Problem(problem.subject, f"{engine.name}: {problem.what}", engine.key)
    shapes: dict[tuple[int, int], Module] = {}
    for module in view.quantized:
        inputs = module.scheme.signature.inputs if module.scheme else None
        if inputs is not None and inputs.group_size and module.shape and module.shape[1] % inputs.group_size:
            shapes.setdefault((module.shape[1], inputs.group_size), module)
    for (columns, group), module in shapes.items():
        for engine in ENGINES:
            if not engine.cuts:
                what = f"{columns} inputs are rounded in groups of {group}, which do not divide them"
                yield Problem(module.name, f"{engine.name}: {what}", engine.key)


def _cache(view: CheckpointView) -> Iterator[Problem]:
    found = cache_format(view.quantization.kv_cache)
    for engine in ENGINES:
        if found is not None and found.name not in engine.caches:
            yield Problem("kv_cache_scheme", f"{engine.label} reads no scales of {found.words}", engine.key)


def _heads(view: CheckpointView) -> Iterator[Problem]:
    for name in architectures_of(view.config):
        for engine in ENGINES if language_model_of(name) is not None else ():
            if engine.heads is not None and (wrong := engine.heads.get(name, "has no class for it")):
                yield Problem("architectures", f"{name}: {engine.label} {wrong}", engine.key)


def _unread_experts(view: CheckpointView) -> Iterator[Problem]:
    architectures = architectures_of(view.config)
    experts = [(module, module.name.rpartition(".")[2]) for module in view.quantized if is_expert(module.name)]
    for engine in ENGINES:
        for module, projection in experts:
            does = next((found for name in architectures if (found := engine.leaves_out(name, projection))), None)
            if does:
                what = f"is {_treatment(module)}; {engine.label} does not load it one by one, and {does}"
                yield Problem(module.name, what, engine.key)


RULES = (
    Rule(
        "engine-schemes",
        "the engine serves the scheme for dense layers, routed experts and the output layer",
        "does not load, or computes nonsense; the message has the engine's own words where it has any",
        "Serve with an engine that does (docs/engines.md), or choose another scheme",
        _schemes,
    ),
    Rule(
        "engine-builds",
        "modules that an engine builds in 16 bits whatever config.json says are not quantized",
        "codes and scales are unknown names: the engine stops, or reads codes as weights",
        "Leave these modules unquantized: name them in `ignore` when quantizing",
        _built,
    ),
    Rule(
        "engine-fuses",
        "modules that an engine runs as one layer are quantized alike",
        "does not load, or the whole layer is read in the format of its first member",
        "Target all members, or ignore all",
        _fused,
    ),
    Rule(
        "fits",
        "every layer suits the format and its kernel, uncut",
        "does not load, stops at the first forward, or computes with wrong scales",
        "Choose a scheme that fits these shapes (scheme.group_size=64 for smaller groups), or leave these modules "
        "unquantized",
        _fits,
    ),
    Rule(
        "engine-cache",
        "the engine reads the scales of the key-value cache",
        "keys and values stay in 16 bits, which is more exact, and takes two to four times the memory",
        "Serve with an engine that does (docs/quantizers.md), or calibrate the cache in FP8 per tensor",
        _cache,
        Severity.WARNING,
    ),
    Rule(
        "engine-heads",
        "the engine has the head of a reward model, a critic or a classifier",
        "does not load, or every value is off by one number that changes with each start",
        "Serve with an engine that does (docs/reward-models.md)",
        _heads,
    ),
    Rule(
        "experts-unread",
        "routed experts are stored as the engine loads them",
        "experts are left as memory was, or random, without an error: tokens get nonsense",
        "For these engines leave the experts in 16 bits (ignore them, or disable their quantizers)",
        _unread_experts,
    ),
)
