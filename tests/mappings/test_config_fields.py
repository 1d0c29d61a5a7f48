"""A field of config.json whose value no model has is refused by name when the file is read."""

import json
from pathlib import Path
from typing import Any

import pytest

from amaxbridge.bridge.hf_defaults import completed
from amaxbridge.export.output.config_and_index import read_config_json
from amaxbridge.mappings.config_fields import EVERY_MODEL, OF_FAMILIES, check_all_fields, check_fields
from amaxbridge.mappings.errors import AmaxbridgeError, UsageError
from amaxbridge.mappings.families import FAMILIES, family_of
from amaxbridge.mappings.families.qwen3_moe import QWEN3_MOE
from tests.fuzz.inputs import DENSE, MOE

ODD: tuple[Any, ...] = ("x", "", -1, 2**40, 10**400, 1.5, [], ["x", 1], {}, {"a": 1}, True, {"__float__": "Infinity"})


def test_every_field_that_a_family_reads_has_a_type() -> None:
    read = set[str]()
    for family in FAMILIES:
        for table in (family.transformer, family.model, family.layers):
            read |= {part for source in table.values() if isinstance(source, str) for part in source.split(".")}
    assert len(read) > 30
    assert read <= OF_FAMILIES.keys()


@pytest.mark.parametrize("name", [name for name in EVERY_MODEL if name in MOE])
def test_fields_of_every_model(tmp_path: Path, name: str) -> None:
    refused = 0
    for value in ODD:
        (tmp_path / "config.json").write_text(json.dumps({**MOE, name: value}))
        try:
            read_config_json(tmp_path)
        except UsageError as error:
            assert f"{name} is" in str(error)
            refused += 1
    assert refused >= 6


@pytest.mark.parametrize("name", [name for name in OF_FAMILIES if name in MOE and name not in EVERY_MODEL])
def test_no_value_of_a_field_gets_past_the_edge_and_fails_later(name: str) -> None:
    """Without transformers, which would refuse most of them: the family either reads the model or names the field."""
    refused = 0
    for value in (*ODD, None):
        try:
            config = completed({**MOE, "head_dim": 16, name: value}, QWEN3_MOE)
            check_fields(config, "config.json", OF_FAMILIES)
            QWEN3_MOE.registry_for(config)
            QWEN3_MOE.model_config(config)
            QWEN3_MOE.layer_pattern(config)
        except AmaxbridgeError:
            refused += 1
    assert refused >= 5


def test_numbers_of_layers_are_bounded_wherever_they_stand() -> None:
    """A loop over them would never end."""
    places = {"num_hidden_layers": 10**9}, {"vision_config": {"depth": 10**9}}, {"a": {"b": {"encoder_layers": 10**7}}}
    for place in places:
        with pytest.raises(UsageError, match="1 fields have values that no model has"):
            check_all_fields(place, "config.json")
    check_all_fields({"vision_config": {"depth": 32, "num_layers": [3, 4]}, "num_hidden_layers": 126}, "config.json")


def test_what_models_have_passes() -> None:
    check_all_fields(DENSE, "config.json")
    lists = {"num_experts": [8, 16], "hidden_size": [64, 128], "text_config": {"num_key_value_heads": [1, 2]}}
    check_all_fields({**DENSE, **lists}, "config.json")
    check_fields(completed(DENSE, family_of(DENSE)), "config.json", OF_FAMILIES)
