"""Deltas of a hundred steps give the tensors of the last; what is lost or damaged is noticed, and sent whole."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amaxbridge.export.delta.stream import Message, Receiver, Sender
from amaxbridge.export.delta.tensor_delta import TensorDelta, apply, delta_of
from amaxbridge.export.kernels import nvfp4
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.mappings.errors import CheckpointError
from amaxbridge.mappings.tensors import TensorSpec
from tests.support.hard_weights import same_bytes

DTYPES = (torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int32, torch.int64)


class Training:
    """A weight that small steps change, as NVFP4 stores it under an amax that stays, beside a norm and a scale."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(5)
        self._weight = torch.randn(64, 256, generator=self._generator) * 0.02
        self._amax = self._weight.abs().max()
        self._step = 0

    def step(self, lr: float = 1e-5) -> dict[str, Tensor]:
        self._step += 1
        self._weight -= lr * torch.randn(self._weight.shape, generator=self._generator).clamp(-3, 3)
        made = nvfp4.quantize(self._weight.bfloat16(), self._amax, arithmetic=Arithmetic.MODELOPT)
        norm = torch.full((16,), 1.0 + self._step / 1024).bfloat16()
        return {"packed": made.packed, "scale": made.block_scale, "global": made.global_scale, "norm": norm}


NAMES = ("packed", "scale", "global", "norm")


def assert_same(receiver: Receiver, tensors: dict[str, Tensor]) -> None:
    assert receiver.tensors.keys() == tensors.keys()
    assert all(same_bytes(receiver.tensors[name], tensor) for name, tensor in tensors.items())


def test_a_hundred_steps_are_a_full_refit() -> None:
    training, sender, receiver = Training(), Sender(), Receiver(NAMES)
    fractions = []
    for step in range(100):
        tensors = training.step()
        assert all(receiver.take(message) for message in sender.step(tensors.items()))
        assert not receiver.end(step)
        assert_same(receiver, tensors)
        fractions.append(sender.last.sent / sender.last.whole)
    assert fractions[0] == 1.0
    assert max(fractions[1:]) < 0.05, "of codes, few change"


def lose(messages: list[Message], before: list[Message]) -> list[Message]:
    return messages[1:]


def repeat(messages: list[Message], before: list[Message]) -> list[Message]:
    return [*messages, messages[0]]


def replay(messages: list[Message], before: list[Message]) -> list[Message]:
    return [*messages, *before]


def replay_instead(messages: list[Message], before: list[Message]) -> list[Message]:
    return before


def lose_all(messages: list[Message], before: list[Message]) -> list[Message]:
    return []


def corrupt_values(messages: list[Message], before: list[Message]) -> list[Message]:
    message = next(each for each in messages if each.delta.values.numel())
    values = message.delta.values.clone()
    values.view(torch.uint8)[0] ^= 1
    return [replace(each, delta=replace(each.delta, values=values)) if each is message else each for each in messages]


def corrupt_positions(messages: list[Message], before: list[Message]) -> list[Message]:
    message = next(each for each in messages if each.delta.gaps is not None and each.delta.gaps.numel())
    assert message.delta.gaps is not None
    gaps = message.delta.gaps.clone()
    gaps.view(torch.uint8)[-1] ^= 1
    return [replace(each, delta=replace(each.delta, gaps=gaps)) if each is message else each for each in messages]


def swap_names(messages: list[Message], before: list[Message]) -> list[Message]:
    names = [message.name for message in messages]
    return [replace(message, name=name) for message, name in zip(messages, [*names[1:], names[0]], strict=True)]


def later_step(messages: list[Message], before: list[Message]) -> list[Message]:
    return [replace(message, step=message.step + 1) for message in messages]


def other_name(messages: list[Message], before: list[Message]) -> list[Message]:
    return [replace(messages[0], name="another"), *messages[1:]]


FAULTS: list[Callable[[list[Message], list[Message]], list[Message]]] = [
    lose, repeat, replay, replay_instead, lose_all, corrupt_values, corrupt_positions, swap_names, later_step,
    other_name,
]  # fmt: skip


@pytest.mark.parametrize("at", [0, 1, 3], ids=["in the first step", "in the second", "later"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_noticed_and_mended(fault: Callable[[list[Message], list[Message]], list[Message]], at: int) -> None:
    """A tensor that is not stale is always that of the step; what is stale comes whole in the next."""
    training, sender, receiver = Training(), Sender(), Receiver(NAMES)
    before: list[Message] = []
    for step in range(6):
        tensors = training.step()
        messages = list(sender.step(tensors.items()))
        if (
            step == at
            and (before or fault not in (replay, replay_instead))
            and (step or fault is not corrupt_positions)
        ):
            for message in fault(messages, before):
                receiver.take(message)
            stale = receiver.end(step)
            assert stale, "noticed"
        else:
            assert all(receiver.take(message) for message in messages)
            stale = receiver.end(step)
            assert not stale - {"another"}
        for name in tensors.keys() - stale:
            assert same_bytes(receiver.tensors[name], tensors[name]), name
        sender.forget(stale)
        before = messages
    assert_same(receiver, tensors)


def test_a_restarted_sender_is_followed_and_the_old_one_is_not() -> None:
    training, old, receiver = Training(), Sender(), Receiver(NAMES)
    late = list(old.step(training.step().items()))
    assert all(receiver.take(message) for message in late)
    new, tensors = Sender(), training.step()
    assert all(receiver.take(message) for message in new.step(tensors.items()))
    assert not any(map(receiver.take, late))
    assert_same(receiver, tensors)


def test_a_tensor_of_another_shape_comes_whole() -> None:
    sender, receiver = Sender(), Receiver(["a"])
    for step, tensor in enumerate((torch.arange(8), torch.arange(8).view(2, 4), torch.arange(3, dtype=torch.int32))):
        assert all(receiver.take(message) for message in sender.step([("a", tensor)]))
        assert not receiver.end(step)
        assert same_bytes(receiver.tensors["a"], tensor)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), size=st.sampled_from([0, 1, 7, 300, 70_000]))
def test_a_delta_makes_the_new_tensor(data: st.DataObject, dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    raw = torch.randint(0, 256, (size * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    base, new = raw.view(dtype), raw.clone()
    for at in data.draw(st.lists(st.integers(0, max(len(raw) - 1, 0)), max_size=50)) if size else ():
        new[at] ^= 255
    delta = delta_of(base, new.view(dtype))
    assert delta.nbytes <= new.nbytes
    assert same_bytes(apply(delta, base.clone()), new.view(dtype))


@pytest.mark.parametrize("far", [1 << 8, 1 << 16, 1 << 20])
def test_gaps_are_as_wide_as_they_must_be(far: int) -> None:
    base = torch.zeros(1 << 21, dtype=torch.uint8)
    new = base.clone()
    new[3] = new[4 + far] = 1
    delta = delta_of(base, new)
    assert delta.gaps is not None
    assert delta.gaps.tolist() == [3, far]
    assert delta.positions.tolist() == [3, 4 + far]
    assert delta.gaps.itemsize == {1 << 8: 2, 1 << 16: 4, 1 << 20: 4}[far]


FOUR, FIVE = TensorSpec((4,), torch.float32), TensorSpec((5,), torch.float32)


@pytest.mark.parametrize(
    "delta",
    [
        TensorDelta(FOUR, torch.tensor([4], dtype=torch.uint8), torch.ones(1)),
        TensorDelta(FOUR, torch.tensor([-1], dtype=torch.int32), torch.ones(1)),
        TensorDelta(FOUR, torch.tensor([0, 0], dtype=torch.uint8), torch.ones(1)),
        TensorDelta(FOUR, torch.tensor([0], dtype=torch.uint8), torch.ones(1).bfloat16()),
        TensorDelta(FIVE, torch.tensor([0], dtype=torch.uint8), torch.ones(1)),
        TensorDelta(FOUR, None, torch.ones(5)),
    ],
    ids=[
        "beyond the end",
        "before the beginning",
        "more positions",
        "another dtype",
        "another tensor",
        "a longer whole",
    ],
)
def test_a_delta_that_does_not_fit_is_refused(delta: TensorDelta) -> None:
    base = torch.zeros(4)
    with pytest.raises(CheckpointError, match="a delta"):
        apply(delta, base)
    assert not base.any(), "nothing was written"
