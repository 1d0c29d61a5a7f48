"""Equal weights of many modules, quantized in one call: the experts of a layer, q and o, the layers of a model.

The bytes are those that `Finalizer.finalize` makes bundle by bundle. Stacks are planned once, on specs, and made as
often as needed, in memory that is kept if the caller keeps it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from amaxbridge.export.amax.fused_group_amax import BlockAmax, GroupAmax, StackAmax
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.kernels.e2m1 import NOT_FINITE
from amaxbridge.export.output.finalizer import Finalizer
from amaxbridge.export.schemes import Scheme
from amaxbridge.export.schemes.scheme import naming
from amaxbridge.mappings.amax import LEARNED_POST, LEARNED_PRE, WEIGHT_QUANTIZER
from amaxbridge.mappings.fused_groups import group_of
from amaxbridge.mappings.names import is_quantizer_state, module_of
from amaxbridge.mappings.tensors import TensorSpec

_SMALL = 1 << 20
"""Bytes of a weight that is copied into a stack on a CPU, where only the work around the loops is saved."""


class Memory(Protocol):
    """Gives a tensor for a name: a new one, or if it `keeps` them the one that it gave before."""

    keeps: bool

    def __call__(self, name: str, spec: TensorSpec, device: torch.device) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Stack:
    """Weights of one shape, dtype and scheme.

    Args:
        modules: in the order of the stack.
        weight: shape and dtype of each, as quantized.
        states: the kinds of per-block state that each has: ends of names.
        measured: True if the amax of their groups come from the weights.
    """

    scheme: Scheme
    modules: tuple[str, ...]
    weight: TensorSpec
    arithmetic: Arithmetic
    states: tuple[str, ...]
    measured: bool

    @property
    def key(self) -> str:
        """A name for its memory."""
        return self.modules[0]

    def rows(self, joined: Mapping[str, Tensor], memory: Memory, place: int) -> Tensor:
        """The weights one below the other, `[n · out, in]`.

        Args:
            place: number of the memory that the rows may lie in; they are not used any more when it is asked for again.
        """
        weights = [joined[f"{module}.weight"] for module in self.modules]
        if len(weights) == 1 and weights[0].dtype == self.weight.dtype and weights[0].is_contiguous():
            return weights[0]
        out, columns = self.weight.shape
        spec = TensorSpec((len(weights) * out, columns), self.weight.dtype)
        rows = memory(f"rows {place}", spec, weights[0].device)
        torch._foreach_copy_(list(rows.split(out)), weights)
        return rows

    def measure(self, rows: Tensor) -> list[Tensor | None]:
        """What each weight contributes to the amax of its group.

        Raises:
            MappingError: a weight holds NaN or Inf; names the module.
        """
        found = list[Tensor | None]()
        for module, part in zip(self.modules, rows.split(self.weight.shape[0]), strict=True):
            with naming(module):
                measured = self.scheme.measure(part, self.arithmetic)
                if measured is not None and not measured.isfinite():
                    raise ValueError(NOT_FINITE)
            found.append(None if measured is None else measured.cpu().reshape(()))
        return found

    def quantize(
        self, rows: Tensor, amax: Sequence[GroupAmax], joined: Mapping[str, Tensor], memory: Memory
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields what is written for the modules.

        Args:
            amax: of each module's group.
            joined: the per-block state by name.

        Raises:
            MappingError: a weight holds NaN or Inf; names the module.
        """
        specs = self.scheme.tensor_specs(self.weight, self.arithmetic)
        count = len(self.modules)
        into = {
            name: memory(f"{self.key}.{name}", TensorSpec((count, *spec.shape), spec.dtype), rows.device)
            for name, spec in specs.items()
        }
        of_weights, of_inputs = _stacked([each.weight for each in amax]), _stacked([each.input for each in amax])
        of_stack = StackAmax(count, of_weights, of_inputs, self.arithmetic)
        try:
            made = self.scheme.constants_of_stack(self.weight, of_stack)
            constants = frozenset(made)
            flat = {
                name: tensor.flatten(0, 1)
                for name, tensor in into.items()
                if name not in constants and specs[name].shape
            }
            made |= self.scheme.quantize_stack(rows, of_stack, self._blocks(joined), flat)
        except ValueError:
            self._name_the_culprit(rows, amax, joined)
            raise
        for name, tensor in made.items():
            if tensor.data_ptr() != into[name].data_ptr():
                into[name].copy_(tensor.reshape(into[name].shape))
        each = {name: tensor.unbind() for name, tensor in into.items()}
        for at, module in enumerate(self.modules):
            for name in specs:
                yield f"{module}.{name}", each[name][at]

    def _blocks(self, joined: Mapping[str, Tensor]) -> BlockAmax | None:
        if not self.states:
            return None
        of_kind = {state: torch.cat([joined[module + state] for module in self.modules]) for state in self.states}
        stored = of_kind.get(WEIGHT_QUANTIZER, of_kind.get(LEARNED_POST))
        assert stored is not None, "only learned amax without those that are stored"
        return BlockAmax(stored, of_kind.get(LEARNED_PRE))

    def _name_the_culprit(self, rows: Tensor, amax: Sequence[GroupAmax], joined: Mapping[str, Tensor]) -> None:
        """Quantizes one by one; the first that cannot be raises, by name."""
        for module, part, of_group in zip(self.modules, rows.split(self.weight.shape[0]), amax, strict=True):
            alone = Stack(self.scheme, (module,), self.weight, self.arithmetic, self.states, self.measured)
            with naming(module):
                self.scheme.constants(self.weight, of_group)
                self.scheme.quantize_rows(part, of_group, alone._blocks(joined))


def stacks_of(finalizer: Finalizer, bundles: Iterable[Mapping[str, TensorSpec]], device: torch.device) -> list[Stack]:
    """The stacks of all quantized weights in some bundles, none of which takes vectors or is stored as codes.

    Args:
        bundles: specs of the tensors of each, as cast, quantizer state included.
        device: that of the weights.
    """
    found: dict[tuple[object, ...], list[str]] = {}
    kinds: dict[tuple[object, ...], tuple[Scheme, TensorSpec, Arithmetic, tuple[str, ...], bool]] = {}
    for specs in bundles:
        for name, spec in specs.items():
            module = module_of(name)
            scheme = finalizer.scheme_of(module) if name.endswith(".weight") else None
            if scheme is None:
                continue
            states = tuple(each for each in (WEIGHT_QUANTIZER, LEARNED_POST, LEARNED_PRE) if module + each in specs)
            shapes = tuple(specs[module + each] for each in states)
            amax = finalizer.amax_of(module)
            kind = scheme, spec, amax.arithmetic, states, amax.weight is None
            alone = device.type == "cpu" and spec.nbytes > _SMALL
            key = (id(scheme), *kind[1:], shapes, amax.input is None, module if alone else "")
            kinds[key] = kind
            found.setdefault(key, []).append(module)
    return [
        Stack(scheme, tuple(found[key]), spec, arithmetic, states, measured)
        for key, (scheme, spec, arithmetic, states, measured) in kinds.items()
    ]


def can_be_stacked(finalizer: Finalizer, specs: Mapping[str, TensorSpec]) -> bool:
    """True if a bundle's tensors are quantized or written as they are, without vectors of input quantizers."""
    state = {name for name in specs if is_quantizer_state(name)}
    weights = [name for name in specs if name not in state]
    if any(finalizer.changes_values(name, state) for name in weights):
        return False
    groups: dict[str, set[torch.dtype]] = {}
    for name in weights:
        if finalizer.scheme_of(module_of(name)) is not None and name.endswith(".weight"):
            groups.setdefault(group_of(module_of(name)).primary, set()).add(specs[name].dtype)
    return all(len(dtypes) == 1 for dtypes in groups.values())


def _stacked(amax: Sequence[Tensor | None]) -> Tensor | None:
    found = [each.reshape(()) for each in amax if each is not None]
    return torch.stack(found) if found else None
