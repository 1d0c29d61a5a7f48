"""JSON of an input is strict; what a parser would pass on to fail elsewhere ends at the file."""

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from amaxbridge.export.disk.safetensors_file import SafetensorsFile
from amaxbridge.export.disk.strict_json import NotStrictJson, misfit, parse_json_object, read_json_object
from amaxbridge.export.output.config_and_index import config_json, json_bytes
from amaxbridge.mappings.errors import CheckpointError

REFUSED = {
    "a key twice": b'{"a": 1, "a": 2}',
    "a key twice inside": b'{"b": [{"a": 1, "a": 1}]}',
    "an infinity by size": b'{"a": 1e999}',
    "half a character": b'{"a": "\\ud800"}',
    "half a character in a key": b'{"\\udfff": 1}',
    "sixty-five levels": b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}",
    "a million levels": b'{"a": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a list": b"[1]",
    "null": b"null",
    "a number": b"3",
    "text": b'"a"',
    "nothing": b"",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "other bytes": b'{"a": "\xff"}',
    "cut off": b'{"a": ',
    "two values": b'{"a": 1} {"b": 2}',
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=list(REFUSED))
def test_what_is_not_strict_is_refused(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(NotStrictJson):
        parse_json_object(text)
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON: .*Download"):
        read_json_object(tmp_path / "config.json")


def test_what_is_strict_is_read() -> None:
    value = {"größe": [1, -2.5, None, True, {"😀": "x" * 5000}], "a": {"b": 10**40}}
    assert parse_json_object(json.dumps(value)) == value
    assert parse_json_object(json.dumps(value, ensure_ascii=False).encode()) == value
    deep: Any = 1
    for _ in range(62):
        deep = [deep]
    assert parse_json_object(json.dumps({"a": deep})) == {"a": deep}


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_infinities_of_published_configs_are_written_as_transformers_does(constant: str) -> None:
    """`time_step_limit: [0.0, Infinity]`, as Mamba models are published."""
    config = parse_json_object(f'{{"time_step_limit": [0.0, {constant}]}}')
    assert config == {"time_step_limit": [0.0, {"__float__": constant}]}
    written = config_json(config, None).decode()
    assert json.loads(written, parse_constant=lambda name: pytest.fail(name)) == config


def test_no_infinity_is_ever_written() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            json_bytes({"a": value})


@pytest.mark.parametrize(
    ("value", "form", "message"),
    [
        ({"a": 1}, {"a": int}, None),
        ({"a": True}, {"a": int}, "a is True"),
        ({"a": 1}, {"a": float}, None),
        ({"a": None}, {"a": (int, None)}, None),
        ({}, {"a": (int, None)}, None),
        ({}, {"a": int}, "a is None"),
        ({"a": ["x", 3]}, {"a": [str]}, r"a\[…\] is 3"),
        ({"a": {"b": "c"}}, {"a": {str: str}}, None),
        ({"a": {"b": 3}}, {"a": {str: str}}, r"a\.b is 3"),
        ({"a": "x"}, {"a": {str: str}}, "a is 'x', not an object"),
    ],
)
def test_forms(value: Any, form: Any, message: str | None) -> None:
    found = misfit(value, form)
    if message is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(message, found), found


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS: dict[str, Any] = {
    "no entry": {"a": 3},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "a key too many": {"a": {**ENTRY, "more": 1}},
    "a shape of text": {"a": {**ENTRY, "shape": ["2"]}},
    "a negative side": {"a": {**ENTRY, "shape": [-2]}},
    "a side that is true": {"a": {**ENTRY, "shape": [True, 2]}},
    "a fraction": {"a": {**ENTRY, "shape": [2.0]}},
    "an empty tensor of a huge shape": {"a": {**ENTRY, "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}},
    "seventeen dims": {"a": {**ENTRY, "shape": [1] * 16 + [2]}},
    "three offsets": {"a": {**ENTRY, "data_offsets": [0, 8, 8]}},
    "offsets of text": {"a": {**ENTRY, "data_offsets": ["0", "8"]}},
    "backwards": {"a": {**ENTRY, "data_offsets": [8, 0]}},
    "an unknown dtype": {"a": {**ENTRY, "dtype": "F4"}},
    "a dtype that is no text": {"a": {**ENTRY, "dtype": ["F32"]}},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": ENTRY},
    "metadata of a list": {"__metadata__": [1], "a": ENTRY},
    "an empty name": {"": ENTRY},
    "a name of 1,001 characters": {"a" * 1001: ENTRY},
    "a name with a newline": {"a\nb": ENTRY},
    "a name that paints the terminal": {"\x1b[31m": ENTRY},
    "nested": {"a": {**ENTRY, "shape": [[[[[[2]]]]]]}},
}


def write_header(file: Path, header: bytes, data: bytes = b"\0" * 8) -> Path:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return file


@pytest.mark.parametrize("header", HEADERS.values(), ids=list(HEADERS))
def test_headers_that_are_none(tmp_path: Path, header: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        SafetensorsFile(write_header(tmp_path / "a.safetensors", json.dumps(header).encode()))


def test_a_dtype_that_is_there_twice(tmp_path: Path) -> None:
    """Python keeps the last one, another reader may keep the first."""
    text = b'{"a": {"dtype": "F32", "dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}'
    with pytest.raises(CheckpointError, match="'dtype' is there twice"):
        SafetensorsFile(write_header(tmp_path / "a.safetensors", text))


def test_a_sound_header_is_read(tmp_path: Path) -> None:
    with SafetensorsFile(write_header(tmp_path / "a.safetensors", json.dumps({"a": ENTRY}).encode())) as opened:
        assert opened.tensors["a"].read().tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["pipe", "directory"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    """Nobody writes into the pipe, so that reading it would never end."""
    path = tmp_path / "a.safetensors"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        SafetensorsFile(path)
