"""Notices that a live model is no longer the one that a plan was made from.

Values may change, and so may the memory that holds them (`param.data = …`). What must stay are the modules, their
tensors with shapes and dtypes, and every setting of the quantizers. A look costs a microsecond or two for a module.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from amaxbridge.bridge.plan.quantizer_gate import WITHOUT_EFFECT
from amaxbridge.mappings.names import is_quantizer_state

_TENSORS = ("_parameters", "_buffers")
_UNWATCHED = frozenset((*_TENSORS, "training", *WITHOUT_EFFECT))
_CONSTANTS = (int, float, str, bool, tuple, type(None), torch.dtype, type)


class Watch:
    """The state of some modules and everything in them at the time that it was made.

    The tensors of quantizers may be replaced by others of the same shape; any other replaced tensor is a change.
    """

    def __init__(self, chunks: Iterable[nn.Module]) -> None:
        self._modules: list[_Module] = []
        for chunk in chunks:
            for name, module in chunk.named_modules():
                self._modules.append(_Module(module, is_quantizer=is_quantizer_state(name)))

    def has_changed(self) -> bool:
        """True if something changed."""
        return any(module.has_changed() for module in self._modules)


class _Module:
    """One module."""

    __slots__ = ("_children", "_module", "_settings", "_tensors", "_vars")

    def __init__(self, module: nn.Module, *, is_quantizer: bool) -> None:
        self._module = module
        self._children = tuple(module._modules.items())
        self._tensors = tuple(_tensors_of(module, by_identity=not is_quantizer))
        self._vars = _frozen(vars(module)) if is_quantizer else None
        self._settings = _watched(self._vars) if self._vars is not None else None

    def has_changed(self) -> bool:
        module = self._module
        if len(module._modules) != len(self._children) or tuple(module._modules.items()) != self._children:
            return True
        held = vars(module)
        if len(held["_parameters"]) + len(held["_buffers"]) != len(self._tensors):
            return True
        for kind, name, tensor, shape, dtype in self._tensors:
            now = held[kind].get(name)
            if now is not tensor and (tensor is not _ANY or now is None):
                return True
            if now is not None and (now.shape != shape or now.dtype != dtype):
                return True
        return self._vars is not None and self._has_other_settings(held)

    def _has_other_settings(self, held: Mapping[str, Any]) -> bool:
        try:
            if held == self._vars:
                return False
        except RuntimeError:  # tensors among the values, which do not compare as one
            pass
        now = _frozen(held)
        if not _same(_watched(now), self._settings or {}):
            return True
        self._vars = now  # what differs has no effect
        return False


_ANY = object()


def _tensors_of(module: nn.Module, *, by_identity: bool) -> Iterator[tuple[str, str, Any, Any, Any]]:
    for kind in _TENSORS:
        for name, tensor in vars(module)[kind].items():
            if tensor is None:
                yield kind, name, None, None, None
            else:
                yield kind, name, tensor if by_identity else _ANY, tensor.shape, tensor.dtype


def _frozen(held: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a module, with copies of those that can change in place. Its tensors are left to others."""
    return {
        name: value
        if name in _UNWATCHED or isinstance(value, (*_CONSTANTS, Tensor, nn.Module)) or callable(value)
        else dict(value)
        if isinstance(value, dict) and name.startswith(("_modules", "_forward"))
        else copy.deepcopy(value)
        for name, value in held.items()
    }


def _watched(held: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in held.items() if name not in _UNWATCHED}


def _same(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    return now.keys() == then.keys() and all(_equal(value, then[name]) for name, value in now.items())


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    return type(one) is type(other) and bool(one == other)
