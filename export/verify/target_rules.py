"""Rules about targets and `ignore`: what `engines` make of every layer, against what the files hold."""

from collections.abc import Iterator

from amaxbridge.export.architectures.engines import Engine, label
from amaxbridge.export.schemes import MODELOPT_FORMAT
from amaxbridge.export.schemes.targets import HEAD, is_pattern, means
from amaxbridge.export.verify.checkpoint_view import CheckpointView
from amaxbridge.export.verify.engine_readings import EXPERT, readings
from amaxbridge.export.verify.finding import Problem, Rule, Severity


def _conflicts(view: CheckpointView) -> Iterator[Problem]:
    for each in view.once(readings):
        if each.reading.conflict and not each.unquantized:
            yield Problem(each.at.layer.name, f"{each.engine.name}: {each.reading.conflict}", each.engine.key)
    for (engine, experts), projections in _first_experts(view).items():
        if len(set(projections.values())) > 1:
            found = ", ".join(f"{name} {label(view.quantization, group)}" for name, group in projections.items())
            what = f"{engine.name}: the projections of an expert are in different groups: {found}"
            yield Problem(experts, what, engine.key)


def _first_experts(view: CheckpointView) -> dict[tuple[Engine, str], dict[str, int | None]]:
    """Engine and layer of experts → the group that the engine reads for each projection of the first expert."""
    layers: dict[tuple[Engine, str], dict[str, int | None]] = {}
    for each in view.once(readings):
        if each.engine.asks_first_expert and (found := EXPERT.fullmatch(each.at.layer.name)):
            layers.setdefault((each.engine, found[1]), {})[found[3]] = each.reading.group
    return layers


def _unread(view: CheckpointView) -> Iterator[Problem]:
    for each in view.once(readings):
        if each.reading.group is None and not each.reading.conflict and not each.unquantized:
            for name in each.at.modules:
                if name in view.modules and view.modules[name].is_quantized:
                    what = f"quantized in the files; {each.engine.name}: {each.reading.why}"
                    yield Problem(name, what, each.engine.key)


def _misread(view: CheckpointView) -> Iterator[Problem]:
    config = view.quantization
    for each in view.once(readings):
        group, engine = each.reading.group, each.engine
        if group is None or each.unquantized:
            continue
        for name in each.at.modules:
            module = view.modules.get(name)
            why = f" ({each.reading.why})" if each.reading.why else ""
            if module is None or not module.is_quantized:
                there = "not quantized in the files" if module else "the embedding, which is not quantized"
                yield Problem(name, f"{there}; {engine.name} reads it as {label(config, group)}{why}", engine.key)
            elif module.group != group:
                what = f"of {label(config, module.group)}; {engine.name} reads {label(config, group)}{why}"
                yield Problem(name, what, engine.key)


def _untargeted(view: CheckpointView) -> Iterator[Problem]:
    if view.quantization.method == MODELOPT_FORMAT:  # where what is not named is not quantized
        return
    for each in view.once(readings):
        neither = each.reading.group is None and each.reading.why.startswith("neither") and not each.unquantized
        plain = all(name in view.modules and not view.modules[name].is_quantized for name in each.at.modules)
        name = each.at.layer.name
        if neither and plain and each.engine.refuses_untargeted and not name.endswith(HEAD):
            yield Problem(name, f"{each.engine.name}: neither targeted nor ignored", each.engine.key)


def _several(view: CheckpointView) -> Iterator[Problem]:
    if len(view.quantization.groups) < 2:
        return
    for name in view.modules:
        found = view.quantization.groups_of(name, classes=())
        if len(found) > 1:
            names = ", ".join(label(view.quantization, group) for group in found)
            yield Problem(name, f"targeted by {names}")


def _router_patterns(view: CheckpointView) -> Iterator[Problem]:
    """A pattern that is to spare a router, `re:.*gate.*`, and spares the experts' gates with it."""
    routers = [name for name in view.modules if name.endswith((".gate", ".router", ".router.weight"))]
    gates = [name for name in view.modules if name.endswith((".gate_proj", ".w1"))]
    for entry in view.quantization.ignore:
        if is_pattern(entry) and any(means(entry, name) for name in routers):
            hit = [name for name in gates if means(entry, name)]
            if hit:
                yield Problem(f"ignore: {entry}", f"spares the router and {len(hit)} gate projections, {hit[0]} first")


_TARGETS = "Correct `targets` and `ignore` in config.json: full names, or patterns with \\. and $"

RULES = (
    Rule(
        "unanimous",
        "the members of a fused layer are all in one config group, or all ignored",
        "does not load",
        _TARGETS,
        _conflicts,
    ),
    Rule(
        "quantized-is-targeted",
        "every quantized module is targeted by a config group and not ignored, in every engine",
        "the engine makes a plain weight of it and does not find one: stops, or leaves it as memory was",
        _TARGETS,
        _unread,
    ),
    Rule(
        "plain-is-ignored",
        "every linear module that is not quantized (routers, vision towers, layers for multi-token prediction, heads) "
        "is ignored, and every quantized one is read in its own group",
        "the engine waits for codes and scales that are not there: stops, or leaves them as memory was",
        "Name these modules in `ignore`, and write \\. and $ in patterns",
        _misread,
    ),
    Rule(
        "targeted-or-ignored",
        "every linear module is targeted or ignored",
        "SGLang and older vLLM stop",
        "Name these modules in `ignore`",
        _untargeted,
    ),
    Rule(
        "one-group",
        "no module is targeted by several groups",
        "which group it gets differs between engines",
        _TARGETS,
        _several,
    ),
    Rule(
        "router-patterns",
        "a pattern that ignores the router does not ignore the experts",
        "serves, with experts in 16 bits",
        "Write `re:.*\\.gate$`",
        _router_patterns,
        Severity.WARNING,
    ),
)
