"""The linear layers that an engine's model class builds, read from its source and never run.

An engine decides in code which layers can be quantized: a layer that is built without a quantization config stays in 16
bits whatever config.json says. `Program` follows the constructors of a model class from module to module, as the
interpreter would, with abstract values: classes, constants, texts in which unknown parts are `*`, "the quantization
config", and "unknown". Where a condition is unknown, both branches are followed, so a layer may be found several times.

CUDA is assumed: `is_cuda()` is true, other platforms are not.
"""

import ast
import builtins
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

_DEPTH = 48  # nested calls; a model class needs about 20
_WIDTH = 12  # values that a name may have; more are unknown
_PLATFORMS = {"is_cuda": True, "is_cuda_alike": True, "is_npu": False, "is_hip": False, "is_rocm": False,
              "is_xpu": False, "is_cpu": False, "is_hpu": False, "is_musa": False, "is_mps": False, "is_tpu": False,
              "is_out_of_tree": False, "cpu_has_amx_support": False}  # fmt: skip


class Kind(StrEnum):
    """The kinds of layers that an engine's quantization config tells apart."""

    LINEAR = "linear"
    PLAIN = "plain"  # torch's own class, which no engine quantizes
    EXPERTS = "experts"
    HEAD = "head"
    EMBEDDING = "embedding"


@dataclass(frozen=True)
class Class:
    """A class of the program."""

    module: str
    node: ast.ClassDef = field(hash=False, compare=False)
    name: str = ""


@dataclass(frozen=True)
class Function:
    module: str
    node: ast.FunctionDef | ast.Lambda = field(hash=False, compare=False)
    at: int = 0
    scope: "Scope | None" = field(default=None, hash=False, compare=False)
    owner: "Self | None" = field(default=None, hash=False, compare=False)


@dataclass(frozen=True)
class Foreign:
    """A name of another package, dotted: `torch.nn.Linear`."""

    name: str


@dataclass(frozen=True)
class Text:
    """A string; `*` stands for unknown parts."""

    text: str


@dataclass(frozen=True)
class Constant:
    value: object


@dataclass(frozen=True)
class QuantConfig:
    """The quantization config of the engine."""


@dataclass(frozen=True)
class Unknown:
    pass


@dataclass(frozen=True)
class New:
    """A call of a class, to be followed when it is known where the module lies."""

    made: Class | Foreign
    arguments: tuple[tuple[str, "Values"], ...]
    positional: tuple["Values", ...] = ()

    def get(self, name: str, at: int | None = None) -> "Values | None":
        if at is not None and at < len(self.positional):
            return self.positional[at]
        return dict(self.arguments).get(name)


@dataclass(frozen=True)
class Many:
    """The modules of a list."""

    members: "Values"


@dataclass(frozen=True)
class Named:
    """A dictionary by string: of keyword arguments, or of modules."""

    entries: tuple[tuple[str, "Values"], ...]

    @property
    def members(self) -> "Values":
        return frozenset[Value]().union(*(values for _, values in self.entries))


@dataclass(frozen=True)
class Self:
    """The instance whose constructor runs, at a path in the tree."""

    cls: Class
    path: str
    attributes: dict[str, "Values"] = field(hash=False, compare=False, default_factory=dict)


Value = Class | Function | Foreign | Text | Constant | QuantConfig | Unknown | New | Many | Named | Self
Values = frozenset[Value]
UNKNOWN: Values = frozenset((Unknown(),))
NONE: Values = frozenset((Constant(None),))
QUANT: Values = frozenset((QuantConfig(),))
Scope = dict[str, Values]


@dataclass(frozen=True)
class Built:
    """A layer that a model class builds.

    Args:
        kind: what it is.
        path: where it lies in the module tree; `*` for numbers.
        quantizable: True if it is built with the quantization config.
        asked: names by which the quantization config knows it.
        parts: experts: names of gate, down and up.
        cls: name of its class.
    """

    kind: Kind
    path: str
    quantizable: bool
    asked: frozenset[str]
    parts: tuple[str, ...] = ()
    cls: str = ""


@dataclass(frozen=True)
class Vocabulary:
    """What one engine calls things.

    Args:
        linear: class from which all linear layers derive.
        head, embedding: classes of the output layer and of embeddings.
        experts: classes and factories of routed experts.
        makers_of_experts: functions that return such a class.
        language_models: functions that build the language model of another architecture.
        foreign_linear: linear classes of other packages.
    """

    linear: str = "LinearBase"
    head: str = "ParallelLMHead"
    embedding: str = "VocabParallelEmbedding"
    experts: frozenset[str] = frozenset()
    makers_of_experts: frozenset[str] = frozenset()
    language_models: frozenset[str] = frozenset()
    foreign_linear: frozenset[str] = frozenset(("nn.Linear", "torch.nn.Linear"))


class Program:
    """The sources of an engine's package.

    Args:
        root: directory that holds the package.
        vocabulary: what the engine calls things.
        architectures: name in config.json → module and class, for language models of other architectures.
    """

    def __init__(
        self, root: Path, vocabulary: Vocabulary, architectures: Mapping[str, tuple[str, str]] | None = None
    ) -> None:
        self.root, self.words, self.architectures = root, vocabulary, dict(architectures or {})
        self._trees: dict[str, dict[str, ast.AST] | None] = {}
        self._names: dict[tuple[str, str], Values] = {}
        self._resolving: set[tuple[str, str]] = set()
        self._mro: dict[Class, list[Class]] = {}
        self._found: list[Built] = []
        self._visited: list[Class] = []
        self._stack: list[object] = []
        self._hosted: list[tuple[str, str]] = []

    # Names

    def definitions(self, module: str) -> dict[str, ast.AST] | None:
        """The statements of a module that bind names; None if the package has no such module."""
        if module not in self._trees:
            path = self.root / Path(*module.split("."))
            file = next((each for each in (path / "__init__.py", path.with_suffix(".py")) if each.is_file()), None)
            self._trees[module] = None
            if file is not None:
                found: dict[str, ast.AST] = {}
                self._trees[module] = found
                package = module if file.name == "__init__.py" else module.rpartition(".")[0]
                self._bind(ast.parse(file.read_text()).body, module, package, found)
        return self._trees[module]

    def _bind(self, body: Iterable[ast.stmt], module: str, package: str, found: dict[str, ast.AST]) -> None:
        for node in body:
            match node:
                case ast.ClassDef() | ast.FunctionDef():
                    found[node.name] = node
                case ast.Import():
                    for alias in node.names:
                        found[alias.asname or alias.name.partition(".")[0]] = ast.Constant(
                            alias.name if alias.asname else alias.name.partition(".")[0], kind="module"
                        )
                case ast.ImportFrom():
                    base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                    source = ".".join([*base, *([node.module] if node.module else [])])
                    for alias in node.names:
                        found[alias.asname or alias.name] = ast.Constant(f"{source}:{alias.name}", kind="from")
                case ast.Assign() if isinstance(node.targets[0], ast.Name):
                    found[node.targets[0].id] = node.value
                case ast.AnnAssign() if isinstance(node.target, ast.Name) and node.value is not None:
                    found[node.target.id] = node.value
                case ast.If():
                    known = self._truth(self.evaluate(node.test, module, {}))
                    if known is not False:
                        self._bind(node.body, module, package, found)
                    if known is not True:
                        self._bind(node.orelse, module, package, found)
                case ast.Try():
                    self._bind(node.body, module, package, found)
                case _:
                    pass

    def resolve(self, module: str, name: str) -> Values:
        """What a name of a module means."""
        key = module, name
        if key not in self._names:
            if key in self._resolving:
                return UNKNOWN
            self._resolving.add(key)
            self._names[key] = self._resolve(module, name)
            self._resolving.discard(key)
        return self._names[key]

    def _resolve(self, module: str, name: str) -> Values:
        found = self.definitions(module)
        if found is None:
            return frozenset((Foreign(f"{module}.{name}"),))
        node = found.get(name)
        match node:
            case None if hasattr(builtins, name):
                return frozenset((Foreign(name),))
            case None if self.definitions(f"{module}.{name}") is not None:
                return frozenset((Foreign(f"{module}.{name}"),))
            case None:
                return self._lazily(module, name)
            case ast.ClassDef():
                return frozenset((Class(module, node, node.name),))
            case ast.FunctionDef():
                return frozenset((Function(module, node, node.lineno),))
            case ast.Constant(kind="module"):
                return frozenset((Foreign(str(node.value)),))
            case ast.Constant(kind="from"):
                source, _, original = str(node.value).partition(":")
                if self.definitions(source) is None:
                    if self.definitions(f"{source}.{original}") is not None:
                        return frozenset((Foreign(f"{source}.{original}"),))
                    short = f"{source}.{original}"
                    return frozenset((Foreign(short),))
                return self.resolve(source, original)
            case ast.expr():
                return self.evaluate(node, module, {})
        return UNKNOWN

    def _lazily(self, module: str, name: str) -> Values:
        """A name that a module-level `__getattr__` imports: the import inside it, on CUDA."""
        getter = (self.definitions(module) or {}).get("__getattr__")
        if isinstance(getter, ast.FunctionDef):
            for node in ast.walk(getter):
                if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
                    package = module.split(".")
                    base = package[: len(package) - node.level + 1] if node.level else []
                    return self.resolve(".".join([*base, node.module or ""]).strip("."), name)
        return UNKNOWN

    def mro(self, cls: Class) -> list[Class]:
        """A class and its base classes, depth first."""
        if cls not in self._mro:
            self._mro[cls] = [cls]  # for a class whose base cannot be told from itself
            found = [cls]
            for base in cls.node.bases:
                target = base.value if isinstance(base, ast.Subscript) else base
                for value in self.evaluate(target, cls.module, {}):
                    if isinstance(value, Class):
                        found += [each for each in self.mro(value) if each not in found]
            self._mro[cls] = found
        return self._mro[cls]

    def derives(self, cls: Class, name: str) -> bool:
        return any(each.name == name for each in self.mro(cls))

    def method(self, cls: Class, name: str, after: Class | None = None) -> tuple[Class, ast.FunctionDef] | None:
        """The method that a call finds. With `after`, the next one in the order, as `super()` finds it."""
        classes = self.mro(cls)
        if after is not None:
            classes = classes[classes.index(after) + 1 :] if after in classes else []
        for each in classes:
            for node in each.node.body:
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    return each, node
        return None

    def class_attribute(self, cls: Class, name: str) -> tuple[Class, ast.expr] | None:
        """An attribute that a class body binds."""
        for each in self.mro(cls):
            for node in each.node.body:
                match node:
                    case ast.Assign() if any(isinstance(at, ast.Name) and at.id == name for at in node.targets):
                        return each, node.value
                    case ast.AnnAssign(target=ast.Name(id=bound), value=ast.expr() as value) if bound == name:
                        return each, value
        return None

    # Building

    def build(self, cls: Class) -> tuple[list[Built], list[Class], list[tuple[str, str]]]:
        """What a model class builds, the classes that it builds it from, and language models of other architectures."""
        self._found, self._visited, self._stack, self._hosted = [], [], [], []
        prefix = frozenset((Text(""),))
        self._construct(New(cls, (("prefix", prefix), ("quant_config", QUANT))), "")
        return self._found, list(dict.fromkeys(self._visited)), self._hosted

    def _place(self, values: Values, path: str) -> None:
        """Places the modules that are assigned to an attribute."""
        for value in values:
            match value:
                case New():
                    self._construct(value, path)
                case Many():
                    self._place(value.members, f"{path}.*")
                case Named():
                    for name, values in value.entries:
                        self._place(values, _join(path, name))

    def _construct(self, new: New, path: str) -> None:
        if isinstance(new.made, Foreign):
            if new.made.name in self.words.foreign_linear:
                self._found.append(Built(Kind.PLAIN, path, False, frozenset(), cls="nn.Linear"))
            return
        cls = new.made
        kind = self._kind(cls)
        if kind is not None:
            self._record(new, cls, kind, path)
            return
        key = cls, path, new.arguments
        if key in self._stack or len(self._stack) > _DEPTH or path.count(".") > 14:
            return
        self._visited.append(cls)
        self._stack.append(key)
        try:
            found = self.method(cls, "__init__")
            if found is not None:
                owner, node = found
                self._run(owner, node, Self(cls, path), new)
        finally:
            self._stack.pop()

    def _kind(self, cls: Class) -> Kind | None:
        if cls.name in self.words.experts:
            return Kind.EXPERTS
        names = {each.name for each in self.mro(cls)}
        if not names.isdisjoint(self.words.experts):
            return Kind.EXPERTS
        if self.words.linear in names:
            return Kind.LINEAR
        if self.words.head in names:
            return Kind.HEAD
        return Kind.EMBEDDING if self.words.embedding in names else None

    def _record(self, new: New, cls: Class, kind: Kind, path: str) -> None:
        given = self._parameter(new, cls, "quant_config")
        if given is None and kind is Kind.LINEAR:
            given = self._passed_up(new, cls)
        quantizable = given is not None and (QuantConfig() in given or given == UNKNOWN)
        prefix = self._parameter(new, cls, "prefix") or self._parameter(new, cls, "layer_name") or frozenset()
        asked = frozenset(each.text for each in prefix if isinstance(each, Text))
        parts: tuple[str, ...] = ()
        if kind is Kind.EXPERTS:
            for value in new.get("ckpt_names") or ():
                if isinstance(value, Constant) and isinstance(value.value, tuple):
                    parts = tuple(str(each) for each in value.value)
        self._found.append(Built(kind, path, quantizable, asked, parts, cls.name))

    def _parameter(self, new: New, cls: Class, name: str) -> Values | None:
        """An argument of a constructor, by name or by place."""
        if (found := new.get(name)) is not None:
            return found
        method = self.method(cls, "__init__")
        if method is None:
            return None
        names = [each.arg for each in method[1].args.args[1:]]
        if name in names and names.index(name) < len(new.positional):
            return new.positional[names.index(name)]
        return None

    def _passed_up(self, new: New, cls: Class) -> Values | None:
        """What the constructor of a linear class of a model's own passes to `super().__init__` as quant_config."""
        method = self.method(cls, "__init__")
        if method is None or not method[0].module.count(".models"):
            return None
        owner, node = method
        scope = self._bound(owner.module, node, new, Self(cls, ""))
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "__init__":
                for keyword in call.keywords:
                    if keyword.arg == "quant_config":
                        return self.evaluate(keyword.value, owner.module, scope)
        return None

    def _bound(self, module: str, node: ast.FunctionDef | ast.Lambda, new: New, instance: Self | None) -> Scope:
        """The parameters of a function."""
        arguments, scope = node.args, Scope()
        names = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
        if instance is not None and names:
            scope[names[0]] = frozenset((instance,))
            names = names[1:]
        every = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
        for name, default in zip(every[len(every) - len(arguments.defaults) :], arguments.defaults, strict=True):
            scope.setdefault(name, self.evaluate(default, module, {}))
        for each, preset in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            if preset is not None:
                scope[each.arg] = self.evaluate(preset, module, {})
        for name, value in zip(names, new.positional, strict=False):
            scope[name] = value
        known = {*names, *(each.arg for each in arguments.kwonlyargs)}
        for name, value in new.arguments:
            if name in known:
                scope[name] = value
            elif arguments.kwarg is not None:
                scope.setdefault(f"**{name}", value)
        for name in known:
            scope.setdefault(name, UNKNOWN)
        return scope

    def _run(self, owner: Class, node: ast.FunctionDef, instance: Self, new: New) -> Values:
        scope = self._bound(owner.module, node, new, instance)
        scope["__class__"] = frozenset((owner,))
        return self._statements(node.body, owner.module, scope)

    # Statements

    def _statements(self, body: Sequence[ast.stmt], module: str, scope: Scope) -> Values:
        returned: Values = frozenset()
        for node in body:
            match node:
                case ast.Assign():
                    value = self.evaluate(node.value, module, scope)
                    for target in node.targets:
                        self._assign(target, value, node.value, module, scope)
                case ast.AnnAssign() if node.value is not None:
                    self._assign(node.target, self.evaluate(node.value, module, scope), node.value, module, scope)
                case ast.Expr():
                    self.evaluate(node.value, module, scope)
                case ast.Return():
                    return returned | (self.evaluate(node.value, module, scope) if node.value else NONE)
                case ast.If():
                    known = self._truth(self.evaluate(node.test, module, scope))
                    other = dict(scope)
                    done = []
                    if known is not False:
                        found = self._statements(node.body, module, scope)
                        returned |= found
                        done.append(bool(node.body) and isinstance(node.body[-1], ast.Return | ast.Raise))
                    if known is not True:
                        returned |= self._statements(node.orelse, module, other)
                        done.append(bool(node.orelse) and isinstance(node.orelse[-1], ast.Return | ast.Raise))
                    if known is False or (known is None and done[0]):
                        scope.clear()
                        scope.update(other)
                    elif known is None and not done[1]:
                        for name in {*scope, *other}:
                            scope[name] = _joined(scope.get(name, frozenset()), other.get(name, frozenset()))
                    if done and all(done):
                        return returned
                case ast.For():
                    self._assign(node.target, self._items(node.iter, module, scope), node.iter, module, scope)
                    returned |= self._statements(node.body, module, scope)
                case ast.With():
                    returned |= self._statements(node.body, module, scope)
                case ast.Try():
                    returned |= self._statements(node.body, module, scope)
                case ast.FunctionDef():
                    scope[node.name] = frozenset((Function(module, node, node.lineno, scope),))
                case ast.ClassDef():
                    scope[node.name] = frozenset((Class(module, node, node.name),))
                case ast.ImportFrom():
                    found: dict[str, ast.AST] = {}
                    self._bind([node], module, module.rpartition(".")[0], found)
                    for name, bound in found.items():
                        assert isinstance(bound, ast.Constant)
                        source, _, original = str(bound.value).partition(":")
                        scope[name] = self.resolve(source, original)
                case _:
                    pass
        return returned

    def _items(self, node: ast.expr, module: str, scope: Scope) -> Values:
        self.evaluate(node, module, scope)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("range", "enumerate"):
            return frozenset((Text("*"),))
        return UNKNOWN

    def _assign(self, target: ast.expr, value: Values, node: ast.expr, module: str, scope: Scope) -> None:
        match target:
            case ast.Name():
                scope[target.id] = value
            case ast.Attribute(value=ast.Name(id=owner)) if (instance := _self(scope.get(owner))) is not None:
                before = instance.attributes.get(target.attr)
                instance.attributes[target.attr] = value if before is None else _joined(before, value)
                self._place(value, _join(instance.path, target.attr))
            case ast.Tuple() | ast.List():
                values = (
                    [self.evaluate(each, module, scope) for each in node.elts]
                    if isinstance(node, ast.Tuple) and len(node.elts) == len(target.elts)
                    else [frozenset(v for v in value if not isinstance(v, Constant) or v.value is not None)]
                    * len(target.elts)
                )
                for each, part in zip(target.elts, values, strict=True):
                    is_number = isinstance(each, ast.Attribute) and each.attr in ("start_layer", "end_layer")
                    self._assign(each, UNKNOWN if is_number else part, each, module, scope)
            case ast.Subscript(value=ast.Attribute(value=ast.Name(id=owner)) as at):
                if (instance := _self(scope.get(owner))) is not None:
                    self._place(value, _join(instance.path, f"{at.attr}.*"))
            case _:
                pass

    # Expressions

    def evaluate(self, node: ast.expr | None, module: str, scope: Scope) -> Values:
        """The values that an expression may have."""
        found = self._evaluate(node, module, scope)
        return UNKNOWN if len(found) > _WIDTH else found

    def _evaluate(self, node: ast.expr | None, module: str, scope: Scope) -> Values:
        match node:
            case None:
                return NONE
            case ast.Constant():
                return frozenset((Text(node.value) if isinstance(node.value, str) else Constant(node.value),))
            case ast.Name():
                if node.id in scope:
                    return scope[node.id]
                if node.id in ("vllm_config", "config"):
                    return UNKNOWN
                found = self.resolve(module, node.id)
                if found == UNKNOWN and node.id.endswith("quant_config"):
                    return QUANT
                return found
            case ast.Attribute():
                return self._attribute(node, module, scope)
            case ast.JoinedStr():
                return self._text(node.values, module, scope)
            case ast.BinOp(op=ast.Add()):
                return self._added(self.evaluate(node.left, module, scope), self.evaluate(node.right, module, scope))
            case ast.IfExp():
                known = self._truth(self.evaluate(node.test, module, scope))
                first = self.evaluate(node.body, module, scope) if known is not False else frozenset()
                other = self.evaluate(node.orelse, module, scope) if known is not True else frozenset()
                return first | other
            case ast.BoolOp(op=ast.Or()):
                return frozenset[Value]().union(*(self.evaluate(each, module, scope) for each in node.values))
            case ast.BoolOp(op=ast.And()):
                truths = [self._truth(self.evaluate(each, module, scope)) for each in node.values]
                if False in truths:
                    return frozenset((Constant(False),))
                return frozenset((Constant(True),)) if all(truths) else UNKNOWN
            case ast.UnaryOp(op=ast.Not()):
                known = self._truth(self.evaluate(node.operand, module, scope))
                return UNKNOWN if known is None else frozenset((Constant(not known),))
            case ast.Compare(ops=[ast.Is() | ast.IsNot() as op], comparators=[ast.Constant(value=None)]):
                left = self.evaluate(node.left, module, scope)
                if left == NONE:
                    return frozenset((Constant(isinstance(op, ast.Is)),))
                if left and not any(isinstance(each, Unknown) or each == Constant(None) for each in left):
                    return frozenset((Constant(isinstance(op, ast.IsNot)),))
                return UNKNOWN
            case ast.Tuple() if all(isinstance(each, ast.Constant) for each in node.elts):
                return frozenset((Constant(ast.literal_eval(node)),))
            case ast.List() | ast.Tuple():
                parts = [self.evaluate(each, module, scope) for each in node.elts]
                return frozenset((Many(frozenset[Value]().union(*parts)),)) if parts else frozenset()
            case ast.ListComp() | ast.GeneratorExp():
                inner = dict(scope)
                for each in node.generators:
                    self._assign(each.target, self._items(each.iter, module, inner), each.iter, module, inner)
                return frozenset((Many(self.evaluate(node.elt, module, inner)),))
            case ast.Dict() if node.keys and all(
                isinstance(key, ast.Constant) and isinstance(key.value, str) for key in node.keys
            ):
                entries = zip(node.keys, node.values, strict=True)
                return frozenset(
                    (Named(tuple((str(key.value), self.evaluate(value, module, scope)) for key, value in entries)),)  # type: ignore[union-attr]
                )
            case ast.Dict():
                parts = [self.evaluate(each, module, scope) for each in node.values]
                return frozenset((Many(frozenset[Value]().union(*parts)),)) if parts else frozenset()
            case ast.DictComp():
                inner = dict(scope)
                for each in node.generators:
                    self._assign(each.target, self._items(each.iter, module, inner), each.iter, module, inner)
                return frozenset((Many(self.evaluate(node.value, module, inner)),))
            case ast.Lambda():
                return frozenset((Function(module, node, node.lineno, dict(scope)),))
            case ast.Starred():
                return self.evaluate(node.value, module, scope)
            case ast.Subscript():
                values = self.evaluate(node.value, module, scope)
                members = [each.members for each in values if isinstance(each, Many | Named)]
                return frozenset[Value]().union(*members) if members else UNKNOWN
            case ast.Call():
                return self._call(node, module, scope)
            case _:
                return UNKNOWN

    def _attribute(self, node: ast.Attribute, module: str, scope: Scope) -> Values:
        owners = self.evaluate(node.value, module, scope)
        found: Values = frozenset()
        for owner in owners:
            match owner:
                case Self():
                    if node.attr in owner.attributes:
                        found |= owner.attributes[node.attr]
                    elif (bound := self.class_attribute(owner.cls, node.attr)) is not None:
                        found |= self.evaluate(bound[1], bound[0].module, {})
                    elif (method := self.method(owner.cls, node.attr)) is not None:
                        found |= {Function(method[0].module, method[1], method[1].lineno, None, owner)}
                case Class():
                    if (bound := self.class_attribute(owner, node.attr)) is not None:
                        found |= self.evaluate(bound[1], bound[0].module, {})
                case Foreign():
                    if self.definitions(owner.name) is not None:
                        found |= self.resolve(owner.name, node.attr)
                    else:
                        found |= {Foreign(f"{owner.name}.{node.attr}")}
        if not found and node.attr.endswith("quant_config"):
            return QUANT
        return found or UNKNOWN

    def _text(self, parts: Sequence[ast.expr], module: str, scope: Scope) -> Values:
        made: Values = frozenset((Text(""),))
        for part in parts:
            value = part.value if isinstance(part, ast.FormattedValue) else part
            made = self._added(made, self.evaluate(value, module, scope))
        return made

    def _added(self, left: Values, right: Values) -> Values:
        if any(isinstance(each, Text) for each in left | right):
            return frozenset(Text(_spelled(one) + _spelled(two)) for one in left for two in right)
        if any(isinstance(each, Many) for each in left | right):
            return left | right
        return UNKNOWN

    @staticmethod
    def _truth(values: Values) -> bool | None:
        if values and all(isinstance(each, Constant) for each in values):
            truths = {bool(each.value) for each in values if isinstance(each, Constant)}
            return truths.pop() if len(truths) == 1 else None
        if values and all(isinstance(each, QuantConfig | Class) for each in values):
            return True
        return None

    def _call(self, node: ast.Call, module: str, scope: Scope) -> Values:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in _PLATFORMS:
            return frozenset((Constant(_PLATFORMS[name]),))
        positional = tuple(
            self.evaluate(each, module, scope) for each in node.args if not isinstance(each, ast.Starred)
        )
        named: dict[str, Values] = {}
        for keyword in node.keywords:
            if keyword.arg is not None:
                named[keyword.arg] = self.evaluate(keyword.value, module, scope)
            else:
                for key, value in scope.items():
                    if key.startswith("**"):
                        named.setdefault(key[2:], value)
                for given in self.evaluate(keyword.value, module, scope):
                    for key, value in given.entries if isinstance(given, Named) else ():
                        named.setdefault(key, value)
        call = New(Foreign(name), tuple(named.items()), positional)
        if name in ("maybe_prefix", "add_prefix"):
            first, second = (positional + tuple(named.values()))[:2]
            prefix, own = (first, second) if name == "maybe_prefix" else (second, first)
            return frozenset(Text(_join(_spelled(one), _spelled(two))) for one in prefix for two in own)
        if name in self.words.language_models:
            self._host(call)
            return self._hosted_model(call, scope)
        if name in self.words.makers_of_experts:
            return frozenset(
                (Function(module, ast.Lambda(ast.arguments([], [], None, [], [], None, []), node.func), -1),)
            )
        if isinstance(node.func, ast.Call) and getattr(node.func.func, "id", getattr(node.func.func, "attr", "")) in (
            self.words.makers_of_experts
        ):
            return frozenset((New(_EXPERTS, call.arguments, positional),))
        if name in self.words.experts:
            return frozenset((New(_EXPERTS, call.arguments, positional),))
        if name == "dict" and not positional:
            return frozenset((Named(tuple(named.items())),))
        if name == "ModuleDict" and positional and any(isinstance(each, Named) for each in positional[0]):
            return positional[0]
        if name in ("ModuleList", "Sequential", "ModuleDict", "list", "tuple", "reversed", "wrap_modules"):
            return frozenset((Many(frozenset[Value]().union(*(_flat(each) for each in positional))),))
        if name in ("make_layers", "make_pp_layers"):
            return self._layers(call, module, scope)
        if name == "super":
            instance = next((each for values in scope.values() for each in values if isinstance(each, Self)), None)
            owner = next((each for each in scope.get("__class__", ()) if isinstance(each, Class)), None)
            if instance is None or owner is None:
                return UNKNOWN
            return frozenset((_Super(instance, owner),))  # type: ignore[arg-type]
        if name == "setattr" and len(positional) == 3:
            for one in positional[0]:
                if isinstance(one, Self):
                    for text in positional[1]:
                        self._place(positional[2], _join(one.path, _spelled(text)))
            return NONE
        if name in ("append", "extend", "add_module", "register_module", "insert", "update"):
            self._appended(node, name, positional, module, scope)
            return NONE
        if name == "type" and len(positional) == 1 and (instance := _self(positional[0])) is not None:
            return frozenset((instance.cls,))
        if name == "cast" and len(positional) == 2:
            return positional[1]
        if name in ("partial",) and positional:
            return frozenset(
                New(each, call.arguments, positional[1:]) if isinstance(each, Class) else each for each in positional[0]
            )
        if name == "str" and positional:
            return frozenset(Text(_spelled(each)) for each in positional[0])
        if isinstance(node.func, ast.Attribute) and name in ("get", "pop", "getattr"):
            return UNKNOWN
        return self._called(self.evaluate(node.func, module, scope), call, node, module, scope)

    def _called(self, callees: Values, call: New, node: ast.Call, module: str, scope: Scope) -> Values:
        found: Values = frozenset()
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if isinstance(node.func, ast.Attribute):
            for owner in self.evaluate(node.func.value, module, scope):
                if isinstance(owner, _Super):
                    method = self.method(owner.instance.cls, name, owner.owner)
                    if method is not None and not self._deep():
                        self._visited.append(method[0])
                        self._stack.append(name)
                        found |= self._run(method[0], method[1], owner.instance, call)
                        self._stack.pop()
                    return found or UNKNOWN
                if isinstance(owner, Class) and name == "__init__":
                    instance = next((each for each in (call.positional or ((),))[0] if isinstance(each, Self)), None)
                    method = self.method(owner, name)
                    if instance is not None and method is not None and not self._deep():
                        self._stack.append(name)
                        rest = New(call.made, call.arguments, call.positional[1:])
                        found |= self._run(method[0], method[1], instance, rest)
                        self._stack.pop()
                    return found or UNKNOWN
        for callee in callees:
            match callee:
                case Class() | Foreign():
                    if isinstance(callee, Class) or callee.name in self.words.foreign_linear:
                        found |= {New(callee, call.arguments, call.positional)}
                    elif callee.name.endswith(("nn.Linear",)):
                        found |= {New(Foreign("nn.Linear"), call.arguments, call.positional)}
                case New():  # a partial
                    found |= {New(callee.made, callee.arguments + call.arguments, callee.positional + call.positional)}
                case Function() if not self._deep() and (callee.module, callee.at) not in self._stack:
                    found |= self._function(callee, call)
        return found or UNKNOWN

    def _function(self, function: Function, call: New) -> Values:
        self._stack.append((function.module, function.at))
        try:
            node = function.node
            scope = self._bound(function.module, node, call, function.owner)
            scope = {**(function.scope or {}), **scope}
            if isinstance(node, ast.Lambda):
                return self.evaluate(node.body, function.module, scope)
            if any(getattr(each, "id", "") == "staticmethod" for each in node.decorator_list):
                scope = {**(function.scope or {}), **self._bound(function.module, node, call, None)}
            return self._statements(node.body, function.module, scope)
        finally:
            self._stack.pop()

    def _deep(self) -> bool:
        return len(self._stack) > _DEPTH

    def _layers(self, call: New, module: str, scope: Scope) -> Values:
        """What the function that makes a layer returns, with a prefix that ends in a number."""
        prefix = call.get("prefix") or (call.positional[2] if len(call.positional) > 2 else frozenset((Text(""),)))
        numbered = frozenset(Text(_join(_spelled(each), "*")) for each in prefix)
        makers = call.get("layer_fn") or (call.positional[1] if len(call.positional) > 1 else frozenset())
        made: Values = frozenset()
        for maker in makers:
            inner = New(Foreign("layer"), (("prefix", numbered), ("idx", frozenset((Text("*"),)))), ())
            match maker:
                case Function():
                    names = [each.arg for each in maker.node.args.args]
                    values = tuple(numbered if each == "prefix" else frozenset((Text("*"),)) for each in names)
                    made |= self._function(maker, New(Foreign("layer"), inner.arguments, values))
                case Class():
                    made |= {New(maker, inner.arguments, ())}
                case New():
                    made |= {New(maker.made, maker.arguments + inner.arguments, maker.positional)}
        return frozenset((Many(made),))

    def _appended(self, node: ast.Call, name: str, positional: tuple[Values, ...], module: str, scope: Scope) -> None:
        if not isinstance(node.func, ast.Attribute) or not positional:
            return
        match node.func.value:
            case ast.Attribute(value=ast.Name(id=owner), attr=attribute):
                if (instance := _self(scope.get(owner))) is not None:
                    self._place(_flat(positional[-1]), _join(instance.path, f"{attribute}.*"))
            case ast.Name(id=owner) if (instance := _self(scope.get(owner))) is not None and name != "append":
                for text in positional[0]:
                    self._place(positional[-1], _join(instance.path, _spelled(text)))
            case ast.Name(id=listed) if listed in scope:
                scope[listed] = scope[listed] | {Many(_flat(positional[-1]))}

    # Language models of other architectures

    def _host(self, call: New) -> None:
        names = call.get("architectures") or frozenset()
        known = [
            member.text
            for value in names
            if isinstance(value, Many)
            for member in value.members
            if isinstance(member, Text)
        ]
        prefix = next((_spelled(each) for each in call.get("prefix") or ()), "")
        self._hosted += [(prefix, each) for each in known] or [(prefix, "")]

    def _hosted_model(self, call: New, scope: Scope) -> Values:
        found: Values = frozenset()
        for value in call.get("architectures") or ():
            for member in value.members if isinstance(value, Many) else ():
                if isinstance(member, Text) and member.text in self.architectures:
                    for cls in self.resolve(*self.architectures[member.text]):
                        if isinstance(cls, Class):
                            found |= {New(cls, (("prefix", call.get("prefix") or frozenset()),), ())}
        return found


@dataclass(frozen=True)
class _Super:
    instance: Self
    owner: Class


_EXPERTS = Class("", ast.ClassDef("Experts", [], [], [], []), "FusedMoE")


def _self(values: Values | None) -> Self | None:
    return next((each for each in values or () if isinstance(each, Self)), None)


def _flat(values: Values) -> Values:
    found: Values = frozenset()
    for each in values:
        found |= _flat(each.members) if isinstance(each, Many | Named) else frozenset((each,))
    return found


def _joined(one: Values, two: Values) -> Values:
    return one | two


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent and name else parent or name


def _spelled(value: Value) -> str:
    match value:
        case Text():
            return value.text
        case Constant() if value.value is None:
            return ""
        case Constant():
            return str(value.value)
    return "*"
