"""`_extra_state`: ModelOpt's is read, Transformer Engine's is skipped, anything else is refused, and no code runs."""

import collections
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from amaxbridge.bridge.stored.inert_pickle import Made, Named, NotReadable, names_in, read_archive, read_pickle
from amaxbridge.bridge.stored.module_state import quantizer_settings
from amaxbridge.mappings.errors import CheckpointError

ENABLED = {"_disabled": False, "_num_bits": (2, 1), "_axis": None, "_block_sizes": {-1: 16, "scale_bits": (4, 3)}}
TENSOR = torch.arange(6.0)
DELAYED = {
    "recipe": collections.Counter(a=1),  # stands for a class that is not imported here
    "scale_fwd": TENSOR,
    "amax_history_fwd": TENSOR,
    "scale_bwd": TENSOR,
    "amax_history_bwd": TENSOR,
    "extra_fp8_variables": {"num_gemms": 1, "fp8_max_fwd": 448.0},
}


class Attack:
    """Runs a command where it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self._witness = witness

    def __reduce__(self) -> object:
        return (os.system, (f"touch {self._witness}",))


def saved(value: Any) -> bytes:
    """As torch.save writes it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def as_tensor(data: bytes) -> bytes:
    """As Megatron stores what a module serialized."""
    return saved([torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)])


def modelopt(**more: Any) -> dict[str, Any]:
    quantizers = {"weight_quantizer": ENABLED, "output_quantizer": {"_disabled": True, "_input_dtype": torch.bfloat16}}
    return {"modelopt_quantizer_state": quantizers, "modelopt_real_quantizer_state": None, **more}


NOTHING = {
    "no bytes": as_tensor(b""),
    "none": saved(None),
    "none pickled": as_tensor(pickle.dumps(None)),
    "delayed scaling": as_tensor(pickle.dumps(DELAYED)),
    "delayed scaling, protocol 2": as_tensor(pickle.dumps(DELAYED, protocol=2)),
    "delayed scaling, version 1": as_tensor(saved({"scale_inv_fwd": TENSOR, "extra_fp8_variables": {}})),
    "delayed scaling, version 1, a stream": saved(io.BytesIO(saved({**DELAYED, "global_fp8_state": (1,)}))),
    "delayed scaling, an operation": as_tensor(pickle.dumps({"forward": DELAYED, "backward": DELAYED})),
    "a stateless recipe": as_tensor(pickle.dumps({"recipe": collections.Counter(), "extra_fp8_variables": {}})),
    "ModelOpt around another's": as_tensor(saved({"extra_state": torch.zeros(3, dtype=torch.uint8)})),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_states_without_quantizers_are_skipped(kind: str) -> None:
    assert dict(quantizer_settings(NOTHING[kind], "state")) == {}


@pytest.mark.parametrize("data", [as_tensor(saved(modelopt())), saved(modelopt()), saved([modelopt()])])
def test_a_configuration_is_read(data: bytes) -> None:
    settings = quantizer_settings(data, "state")
    assert settings["weight_quantizer"] == ENABLED
    assert settings["output_quantizer"]["_input_dtype"] == torch.bfloat16


OTHERS = {
    "a dict": (as_tensor(pickle.dumps({"scales": 1})), "it has scales"),
    "more than Transformer Engine's": (as_tensor(pickle.dumps({**DELAYED, "lora": 1})), "amax_history_fwd"),
    "numbers": (saved(torch.zeros(2, 2)), "it has Made"),
    "a class": (as_tensor(pickle.dumps(Path("a"))), "pathlib"),
    "ModelOpt's sparsity": (as_tensor(saved(modelopt(modelopt_sparse_state={}))), "saved modelopt_sparse_state here"),
    "packed weights": (as_tensor(saved(modelopt(modelopt_q_tensor_state={"metadata": 1}))), "packed by ModelOpt"),
    "no switch": (as_tensor(saved({"modelopt_quantizer_state": {"weight_quantizer": {}}})), "complete configuration"),
    "no bits": (as_tensor(saved({"modelopt_quantizer_state": {"a": {"_disabled": False}}})), "complete configuration"),
    "a path": (as_tensor(saved({"modelopt_quantizer_state": {"a": {"x": Path("a")}}})), "not plain data"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_states_are_refused_by_name(kind: str) -> None:
    data, message = OTHERS[kind]
    with pytest.raises(CheckpointError, match=message) as error:
        quantizer_settings(data, "decoder.layers.0.mlp._extra_state")
    assert str(error.value).startswith("decoder.layers.0.mlp._extra_state")
    assert "weights_only" not in str(error.value)


def test_nothing_is_called(tmp_path: Path) -> None:
    """Wherever the call stands. Transformer Engine's state is skipped, the call included."""
    attack = Attack(tmp_path / "run")
    inside = as_tensor(saved({"modelopt_quantizer_state": {"weight_quantizer": {**ENABLED, "backend": attack}}}))
    for data in (as_tensor(pickle.dumps(attack)), as_tensor(saved(attack)), saved(attack), inside):
        with pytest.raises(CheckpointError, match=r"posix\.system"):
            quantizer_settings(data, "state")
    assert dict(quantizer_settings(as_tensor(pickle.dumps({**DELAYED, "recipe": attack})), "state")) == {}
    assert not (tmp_path / "run").exists()


def nested(levels: int) -> tuple[Any, ...]:
    value: tuple[Any, ...] = ()
    for _ in range(levels):
        value = (value, value)
    return value


def looped() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def bomb() -> bytes:
    """A zip file in which half a gigabyte of zeros is packed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/data.pkl", "w") as file:
        for _ in range(128):
            file.write(bytes(1 << 20))
    return stream.getvalue()


def text(content: bytes) -> bytes:
    """The opcode of a string."""
    return b"X" + struct.pack("<I", len(content)) + content


def packed(method: int) -> bytes:
    """A state in a zip file of another compression, damaged."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("a/data.pkl", pickle.dumps(list(range(1000))))
    content = bytearray(stream.getvalue())
    begin = content.index(b"data.pkl") + 8
    content[begin + 20 : begin + 60] = bytes(40)
    return bytes(content)


BAD = {
    "doubling": saved(nested(60)),
    "doubling as a key": as_tensor(b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s."),
    "a loop": saved(looped()),
    "a bomb": bomb(),
    "a tuple of a million as a key": as_tensor(
        b"\x80\x02}(" + b"N" * 10**6 + b"tq\x00" + b"0" + b"h\x00Ns" * 10**5 + b"."
    ),
    "a number of a megabyte as a key": as_tensor(
        b"\x80\x02\x8b" + struct.pack("<I", 10**6) + b"\x7f" * 10**6 + b"q\x000}" + b"h\x00Ns" * 10**5 + b"."
    ),
    "a text that is copied again and again": as_tensor(
        b"\x80\x02c_codecs\nencode\nq\x00"
        + text(b"a" * 10**7)
        + text(b"latin1")
        + b"\x86q\x01"
        + b"h\x00h\x01R" * 5000
        + b"."
    ),
    "a list that is copied again and again": as_tensor(
        b"\x80\x02ctorch\nSize\nq\x00](" + b"N" * 10**6 + b"e\x85q\x01" + b"h\x00h\x01R" * 5000 + b"."
    ),
    "compressed by bzip2": packed(zipfile.ZIP_BZIP2),
    "compressed by LZMA": packed(zipfile.ZIP_LZMA),
    "a far memo": as_tensor(b"\x80\x02Nr\xff\xff\xff\xff."[:-1] + b"j\xfe\xff\xff\xff."),
    "no end": as_tensor(b"\x80\x02N"),
    "an empty stack": as_tensor(b"\x80\x020."),
    "a long string": as_tensor(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"a."),
    "an unknown opcode": as_tensor(b"\x80\x02\x82\x01."),
    "text": b"what is this",
    "half a file": saved(modelopt())[:-300],
    "half a state": as_tensor(saved(modelopt())[:-300]),
}


@pytest.mark.parametrize("kind", BAD)
def test_damage_and_bombs_are_refused(kind: str) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read|not plain data"):
        quantizer_settings(BAD[kind], "state")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_what_pickle_says(protocol: int) -> None:
    value = {
        "a": [1, -2, 1 << 70, 2.5, True, None, "ä", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        (1, "b"): collections.OrderedDict(c=[{}, []]),
        3: {"d": {"e": -(1 << 40)}},
    }
    shared = [value, value["a"], "ä"]
    assert read_pickle(pickle.dumps(shared, protocol=protocol)) == shared


def test_objects_stay_inert() -> None:
    value = read_archive(saved({"counter": collections.Counter(a=2), "queue": collections.deque([1, 2])}))
    assert isinstance(value["counter"], Made)
    assert value["counter"].by == Named("collections", "Counter")
    assert value["queue"].items == {0: 1, 1: 2}
    assert list(names_in(value)) == ["collections.deque", "collections.Counter"]


def test_what_is_no_archive() -> None:
    with pytest.raises(NotReadable):
        read_archive(pickle.dumps(1))
