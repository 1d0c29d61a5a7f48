"""Tables that model classes declare: how an engine renames modules, and which projections it fuses.

They are literals in class bodies, sometimes built from those of other classes. What is computed from a model's config
cannot be read; `Unreadable` names it.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tests.engines.module_tree import Class, Program

STEPS = ("regex", "substr", "prefix", "suffix")
"""The order in which vLLM's WeightsMapper renames; SGLang's has no `regex`."""


class Unreadable(Exception):
    """Raised for an expression that is no literal."""


@dataclass(frozen=True)
class Mapper:
    """A `WeightsMapper`: each step maps what is replaced to its replacement, None to drop the weight."""

    steps: dict[str, dict[str, str | None]] = field(default_factory=dict)
    stacked: dict[str, tuple[str, Any]] = field(default_factory=dict)

    def __or__(self, other: "Mapper") -> "Mapper":
        steps = {name: self.steps.get(name, {}) | other.steps.get(name, {}) for name in STEPS}
        return Mapper(steps, self.stacked | other.stacked)

    @property
    def renames(self) -> list[list[str]]:
        """The renames that apply to names of modules, in order; drops are of weights only."""
        return [
            [step, one, other]
            for step in STEPS
            for one, other in self.steps.get(step, {}).items()
            if other is not None and one != other
        ]


def literal(program: Program, module: str, node: ast.expr) -> Any:
    """The value of a literal, of a name or class attribute that is bound to one, or of their union."""
    match node:
        case ast.Constant():
            return node.value
        case ast.List() | ast.Tuple() | ast.Set():
            return [literal(program, module, each) for each in node.elts]
        case ast.Dict():
            found: dict[Any, Any] = {}
            for key, value in zip(node.keys, node.values, strict=True):
                if key is None:
                    found |= literal(program, module, value)
                else:
                    found[literal(program, module, key)] = literal(program, module, value)
            return found
        case ast.BinOp(op=ast.BitOr() | ast.Add()):
            return literal(program, module, node.left) | literal(program, module, node.right)
        case ast.Call(func=ast.Name(id="WeightsMapper")):
            given = {each.arg: literal(program, module, each.value) for each in node.keywords if each.arg}
            steps = {name: given.get(f"orig_to_new_{name}", {}) for name in STEPS}
            return Mapper(steps, {key: tuple(value) for key, value in given.get("orig_to_new_stacked", {}).items()})
        case ast.Call(func=ast.Attribute(attr="compile"), args=[ast.Constant(value=str() as pattern), *_]):
            return pattern
        case ast.Call(func=ast.Attribute(value=ast.Name(id="dict"), attr="fromkeys"), args=[keys, value]):
            return dict.fromkeys(literal(program, module, keys), literal(program, module, value))
        case ast.Subscript(value=owner, slice=ast.Constant(value=key)):
            return literal(program, module, owner)[key]
        case ast.Name():
            return _named(program, module, node.id)
        case ast.Attribute(value=owner, attr=name):
            for value in program.evaluate(owner, module, {}):
                if isinstance(value, Class) and (bound := program.class_attribute(value, name)) is not None:
                    return literal(program, bound[0].module, bound[1])
        case ast.DictComp() | ast.ListComp():
            try:
                return eval(compile(ast.Expression(node), "<literal>", "eval"), {"__builtins__": {}, "re": _RE})
            except NameError as error:
                raise Unreadable(ast.unparse(node)[:120]) from error
    raise Unreadable(ast.unparse(node)[:120])


class _RE:
    compile = staticmethod(lambda pattern: pattern)


def _named(program: Program, module: str, name: str) -> Any:
    for _ in range(8):
        found = (program.definitions(module) or {}).get(name)
        if isinstance(found, ast.Constant) and found.kind == "from":
            module, _, name = str(found.value).partition(":")
        elif isinstance(found, ast.expr):
            return literal(program, module, found)
        else:
            break
    raise Unreadable(name)


def attribute(program: Program, cls: Class, name: str) -> Any:
    """A class attribute that is a literal; None if there is none."""
    bound = program.class_attribute(cls, name)
    if bound is None or isinstance(bound[1], ast.Constant):
        return None
    return literal(program, bound[0].module, bound[1])


def added_entries(program: Program, cls: Class, name: str) -> Iterator[tuple[str, list[str]]]:
    """Entries that the constructors of a class add to a table of theirs: `self.name["fused"] = [...]`."""
    for each in program.mro(cls):
        for node in ast.walk(each.node):
            match node:
                case ast.Assign(
                    targets=[ast.Subscript(value=ast.Attribute(attr=table), slice=ast.Constant(value=str() as key))],
                    value=ast.List(),
                ) if table == name:
                    yield key, literal(program, each.module, node.value)


@cache
def stacked(program: Program, cls: Class) -> tuple[tuple[str, str], ...]:
    """Fused projection and member, of the lists `(fused, member, shard)` that a class loads weights by."""
    return tuple(dict.fromkeys(_stacked(program, cls)))


def _stacked(program: Program, cls: Class) -> Iterator[tuple[str, str]]:
    for each in program.mro(cls):
        for node in ast.walk(each.node):
            match node:
                case ast.Tuple(elts=[ast.Constant(value=str() as fused), ast.Constant(value=str() as member), shard]):
                    number = shard.value if isinstance(shard, ast.Constant) else 0
                    is_shard = isinstance(shard, ast.Tuple) or isinstance(number, int) or number in ("q", "k", "v")
                    if is_shard and re.fullmatch(r"\.?[\w.]+", fused) and re.fullmatch(r"\.?[\w.]+", member):
                        yield fused, member
