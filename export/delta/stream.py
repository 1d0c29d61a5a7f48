"""Deltas on their way from a trainer to an engine: what was sent last, and what comes twice, too late or never.

Each tensor has a chain. It begins with a hash of the whole tensor, and each delta extends it by a hash of what that
delta holds. Sender and receiver extend it alike, so equal chains mean equal tensors, though nobody hashes whole tensors
again. A message says its step, the chain that it continues, and the one in which it ends. A message that is lost,
repeated, damaged or out of order leaves a chain that the next does not continue, or a tensor without the step: nothing
is applied then, and the tensor is sent whole.
"""

import hashlib
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from amaxbridge.export.delta.tensor_delta import TensorDelta, apply, delta_of, deltas_of, flat
from amaxbridge.mappings.errors import CheckpointError
from amaxbridge.mappings.tensors import TensorSpec

_NOTHING = ""
_BATCH = 64 << 20  # bytes that are compared at once


@dataclass(frozen=True, slots=True)
class Message:
    """One tensor's change on its way.

    Args:
        name: of the tensor.
        session: names the sender; a restarted one has another.
        step: number of the sender's step, from 0. Every step has a message for every tensor.
        before: the chain that it continues; "" for a whole tensor, which continues none.
        after: the chain that it ends in.
        delta: the change.
    """

    name: str
    session: str
    step: int
    before: str
    after: str
    delta: TensorDelta


@dataclass(slots=True)
class Sent:
    """The bytes of a step.

    Args:
        sent: bytes that were sent: positions and values.
        whole: bytes of all tensors.
        tensors: number of tensors.
        tensors_whole: how many were sent whole.
    """

    sent: int = 0
    whole: int = 0
    tensors: int = 0
    tensors_whole: int = 0


class Sender:
    """Keeps a copy of every tensor that it sent, on the tensor's device, and sends what changed.

    Attributes:
        last: the bytes of the last step.
    """

    def __init__(self) -> None:
        self._session = uuid.uuid4().hex
        self._step = -1
        self._held: dict[str, Tensor] = {}
        self._chains: dict[str, str] = {}
        self.last = Sent()

    def step(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Message]:
        """Yields a message for every tensor, in the order in which they come.

        That of an unchanged tensor is empty; that of a whole one holds the tensor itself, not a copy.

        A step that is not read to its end leaves the receiver without some tensors, as if they were lost.
        """
        self.last = Sent()
        self._step += 1
        for batch in _in_batches(tensors):
            for name, delta in self._deltas(batch).items():
                before = _NOTHING if delta.gaps is None else self._chains[name]
                after = self._chains[name] = chained(before, self._session, self._step, name, delta)
                self.last.sent += delta.nbytes
                self.last.whole += delta.spec.nbytes
                self.last.tensors += 1
                self.last.tensors_whole += delta.gaps is None
                yield Message(name, self._session, self._step, before, after, delta)

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Sends these tensors whole in the next step, as to a receiver for which they are stale; None for all."""
        for name in list(self._held) if names is None else names:
            self._held.pop(name, None)

    def _deltas(self, batch: Mapping[str, Tensor]) -> dict[str, TensorDelta]:
        """What changed of some tensors, which are held from now on."""
        deltas = dict[str, TensorDelta]()
        alike: dict[tuple[int, torch.device], list[str]] = {}
        for name, new in batch.items():
            held = self._held.get(name)
            if held is None or TensorSpec.of(held) != TensorSpec.of(new) or held.device != new.device:
                deltas[name] = delta_of(None, new)
                self._held[name] = new.clone(memory_format=torch.contiguous_format)
            else:
                alike.setdefault((new.itemsize, new.device), []).append(name)
        for names in alike.values():
            deltas |= zip(names, deltas_of([self._held[n] for n in names], [batch[n] for n in names]), strict=True)
            changed = [name for name in names if deltas[name].values.numel()]
            if changed:
                torch._foreach_copy_([self._held[name] for name in changed], [batch[name] for name in changed])
        return {name: deltas[name] for name in batch}


class Receiver:
    """Applies messages to the tensors that it holds.

    Args:
        names: every tensor that a step brings: `Refit.specs`.

    Attributes:
        tensors: what it holds, by name. They are changed in place.
        stale: the tensors that are not those of the step. Give them to `Sender.forget`: they come whole in the next.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.stale: set[str] = set()
        self._names = frozenset(names)
        self._session, self._ended = "", set[str]()
        self._at: dict[str, tuple[int, str]] = {}  # the last step and chain of each tensor

    def take(self, message: Message) -> bool:
        """Applies a message. False if it does not fit: its tensor is stale then, and stays as it was."""
        name, delta = message.name, message.delta
        if message.session != self._session and message.session not in self._ended:
            self._ended.add(self._session)
            self._session, self._at = message.session, {}
        step, chain = self._at.get(name, (-1, _NOTHING))
        is_whole = message.before == _NOTHING and delta.gaps is None
        follows = message.step == step + 1 and message.before == chain != _NOTHING
        fits = (
            name in self._names and message.session == self._session and ((is_whole and message.step > step) or follows)
        )
        if not fits or message.after != chained(message.before, message.session, message.step, name, delta):
            self.stale.add(name)
            return False
        held = self.tensors.get(name)
        try:
            self.tensors[name] = apply(delta, None if is_whole and _is_other(held, delta) else held)
        except CheckpointError:
            self.stale.add(name)
            return False
        self._at[name] = message.step, message.after
        self.stale.discard(name)
        return True

    def end(self, step: int) -> frozenset[str]:
        """The tensors that are not those of the step, after its last message: those without one are among them."""
        self.stale |= {name for name in self._names if self._at.get(name, (-1, _NOTHING))[0] != step}
        return frozenset(self.stale)


def chained(before: str, session: str, step: int, name: str, delta: TensorDelta) -> str:
    """The chain after a change."""
    kind = "whole" if delta.gaps is None else delta.gaps.dtype
    digest = hashlib.sha256("\n".join(map(str, (before, session, step, name, delta.spec, kind))).encode())
    for tensor in (delta.gaps, delta.values):
        if tensor is not None:
            digest.update(flat(tensor).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def _in_batches(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The tensors by name, some megabytes at a time."""
    batch, nbytes = dict[str, Tensor](), 0
    for name, tensor in tensors:
        batch[name] = tensor.detach()
        nbytes += tensor.nbytes
        if nbytes >= _BATCH:
            yield batch
            batch, nbytes = {}, 0
    if batch:
        yield batch


def _is_other(held: Tensor | None, delta: TensorDelta) -> bool:
    return held is not None and TensorSpec.of(held) != delta.spec
