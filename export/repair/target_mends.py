"""Mends of `targets` and `ignore`: they are held against what the files hold, as every engine reads them.

The files say which module is quantized. An entry of `ignore` that hits a quantized module goes, and what it rightly
spared is named; what is missing is added by name. If engines still read a module in another group than its own, targets
are written anew for exactly the modules of each group; a module that no group or several groups target belongs to the
one scheme whose tensors it has.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from amaxbridge.export.architectures.facts import GUESS, Knowledge
from amaxbridge.export.output.config_and_index import fused_layers, patterns_of
from amaxbridge.export.output.module_schemes import names_elsewhere, unquantized_modules
from amaxbridge.export.quant_config import ConfigGroup
from amaxbridge.export.repair.edits import Change, Edits, Found, Refusal
from amaxbridge.export.repair.mend import Mend, Unseen
from amaxbridge.export.repair.mended_view import MendedView
from amaxbridge.export.schemes import COMPRESSED_TENSORS
from amaxbridge.export.schemes.stored_specs import stored_specs
from amaxbridge.export.schemes.targets import EVERY_LINEAR, HEAD, is_pattern, is_sound, means
from amaxbridge.export.verify import config_rules, fact_rules, target_rules
from amaxbridge.export.verify.checkpoint_view import INPUT_SCALES, Module, shape_of
from amaxbridge.export.verify.engine_readings import readings
from amaxbridge.export.verify.fact_rules import architecture
from amaxbridge.mappings.names import natural_key

RULES = (
    "unanimous", "quantized-is-targeted", "plain-is-ignored", "targeted-or-ignored", "one-group", "router-patterns",
    "mixed-targets", "patterns", "accounted",
)  # fmt: skip
_CHECKS = [rule for rule in (*target_rules.RULES, *config_rules.RULES, *fact_rules.RULES) if rule.name in RULES]


def _targets(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    raw = view.quantization.raw
    is_ours = raw.get("quant_method") == COMPRESSED_TENSORS
    if not is_ours or view.quantization.faults or not view.quantized or _is_right(view):
        return
    ignored = {**raw, "ignore": [*_ignore(view)]}
    found = view.with_config(ignored)
    config: Mapping[str, Any] = ignored
    if not _is_right(found):
        groups = _groups(view)
        yield from (each for each in groups.values() if isinstance(each, Refusal))
        if any(isinstance(each, Refusal) for each in groups.values()):
            return
        config = _retargeted(found, {name: group for name, group in groups.items() if isinstance(group, ConfigGroup)})
        found = view.with_config(config)
        config = {**config, "ignore": [*_ignore(found)]}
    if raw != config:
        yield from _differences(view, raw, config)


def _is_right(view: MendedView) -> bool:
    return all(rule.finding(view) is None for rule in _CHECKS)


def _ignore(view: MendedView) -> list[str]:
    """`ignore` without what hits quantized modules, and with what it lacks."""
    right, quantized = _unquantized(view), _quantized(view)
    kept = [entry for entry in view.quantization.ignore if is_sound(entry) and not quantized.are_hit_by(entry)]
    names = {entry for entry in kept if not is_pattern(entry)}
    patterns = [entry for entry in kept if is_pattern(entry)]
    lacking = [name for name in right if name not in names and not any(means(each, name) for each in patterns)]
    return [*kept, *lacking]


def _unquantized(view: MendedView) -> list[str]:
    knowledge: Knowledge = view.once(architecture) or GUESS
    plain = [name for name, module in view.modules.items() if not module.is_quantized]
    shapes = {name: stored.spec.shape for name, stored in view.tensors.items()}
    found = unquantized_modules(sorted(plain, key=natural_key), shapes, knowledge)
    head = [HEAD] if view.tied and HEAD not in found else []
    return [*found, *head, *fused_layers(found)]


@dataclass(frozen=True, slots=True)
class _Quantized:
    """What engines call quantized layers.

    Args:
        names: of modules, members and layers.
        ends: each name without its first parts, in engines that read an entry of `ignore` as the end of a name.
        fused: names of fused layers, in engines where a pattern may hit them.
    """

    names: frozenset[str]
    ends: frozenset[str]
    fused: frozenset[str]

    def are_hit_by(self, entry: str) -> bool:
        """True if some engine takes an entry of `ignore` for one of them."""
        if is_pattern(entry):
            return any(means(entry, name) for name in self.fused)
        return entry in self.names or entry in self.ends or entry == EVERY_LINEAR


def _quantized(view: MendedView) -> _Quantized:
    names, ends, fused = set[str](), set[str](), set[str]()
    for each in view.once(readings):
        modules = [name for name in each.at.modules if name in view.modules and view.modules[name].is_quantized]
        own = {*each.at.layer.members, *modules} if modules else set()
        names |= own | ({each.at.layer.name} if modules else set())
        fused |= own | ({each.at.layer.name} if modules and each.engine.patterns_ignore_fused else set())
        if each.engine.reads_suffixes:
            ends |= {".".join(parts[at:]) for name in own for parts in [name.split(".")] for at in range(1, len(parts))}
    return _Quantized(frozenset(names), frozenset(ends), frozenset(fused))


def _groups(view: MendedView) -> dict[str, ConfigGroup | Refusal]:
    """Quantized module → the config group whose scheme its tensors are of."""
    found: dict[str, ConfigGroup | Refusal] = {}
    for module in view.quantized:
        fitting = [group for group in view.quantization.groups if _fits(module, group)]
        named = [view.quantization.groups[number] for number in view.quantization.groups_of(module.name)]
        preferred = [group for group in named if group in fitting] or fitting
        if len({str(group.signature) for group in preferred}) == 1:
            found[module.name] = preferred[0]
        else:
            why = "of no config group's scheme" if not preferred else "of the schemes of several config groups"
            found[module.name] = Refusal(module.name, f"its tensors are {why}: {', '.join(sorted(module.tensors))}")
    return found


def _fits(module: Module, group: ConfigGroup) -> bool:
    """True if the tensors of a module are those of a group's scheme."""
    shape = None if group.scheme is None else shape_of(module.tensors, group.scheme)
    if group.scheme is None or shape is None:
        return False
    try:
        planned = stored_specs(group.scheme, shape)
    except ValueError:
        return False
    own = {name: stored.spec for name, stored in module.tensors.items() if name != "bias"}
    needed = planned.keys() - INPUT_SCALES.keys()
    return needed <= own.keys() <= planned.keys() and all(own[name] in planned[name] for name in own)


def _retargeted(view: MendedView, groups: Mapping[str, ConfigGroup]) -> dict[str, Any]:
    """The config with targets for exactly the modules of each group, and without groups that have none."""
    raw = deepcopy(dict(view.quantization.raw))
    members: dict[str, list[str]] = {}
    for module, group in groups.items():
        members.setdefault(group.name, []).append(module)
    spared, known = set(_unquantized(view)), view.once(architecture) or GUESS
    alone = len(members) == 1 and not any(module.endswith(HEAD) for module in groups)
    entries = []
    for name, modules in members.items():
        others = (groups.keys() - set(modules)) | spared
        named = sorted(modules, key=natural_key)
        targets = [EVERY_LINEAR] if alone else patterns_of(named, others, lambda each: names_elsewhere(known, each))
        entries.append({**raw["config_groups"][name], "targets": targets})
    return {**raw, "config_groups": {f"group_{number}": entry for number, entry in enumerate(entries)}}


def _differences(view: MendedView, raw: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Change]:
    """Each entry that goes and each that is added."""
    edits = Edits(config={**view.config, "quantization_config": dict(config)})
    before, after = raw.get("ignore") or [], config["ignore"]
    had, has = set(before), set(after)
    for entry in before:
        if entry not in has:
            why = "hits quantized modules" if is_sound(entry) else "is no regular expression"
            yield Change(f"ignore: {entry}", f"is removed: it {why}", edits)
    for entry in after:
        if entry not in had:
            yield Change(f"ignore: {entry}", "is added: it is not quantized", edits)
    found = {name: entry.get("targets") for name, entry in raw["config_groups"].items()}
    right = {name: entry.get("targets") for name, entry in config["config_groups"].items()}
    for name in dict.fromkeys([*found, *right]):
        if found.get(name) != right.get(name):
            becomes = (
                "the group goes, it has no modules" if name not in right else f"targets become {_shown(right[name])}"
            )
            yield Change(f"config_groups.{name}", becomes, edits)


def _shown(targets: list[str]) -> str:
    more = f" and {len(targets) - 3} more" if len(targets) > 3 else ""
    return ", ".join(targets[:3]) + more


MENDS = (
    Mend(
        "targets-and-ignore",
        RULES,
        "targets or ignore do not say what the files hold: a module in 16 bits is missed, a quantized one is hit, a "
        "pattern is broken, a module is targeted by no group or by several",
        "entries that hit quantized modules are replaced by the names of what they rightly spare, and missing names "
        "are added; targets are written anew only if that is not enough. A module whose tensors fit no group, or "
        "several, is refused",
        _targets,
    ),
)
