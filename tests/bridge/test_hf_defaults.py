"""Without transformers, `hf_defaults` completes a config.json as transformers would, or it is refused."""

import json
from pathlib import Path

import pytest

from amaxbridge.bridge.hf_defaults import completed
from amaxbridge.mappings.extras import MissingExtraError
from amaxbridge.mappings.families import FAMILIES, family_of
from tests.support.hf_defaults_table import CONFIGS, TABLE, filled, read_of, table
from tests.support.tiny_models import TINY_MODELS

REFUSED = {  # published before transformers wrote these fields
    "DeepSeek-V3.2": "mlp_layer_types",
    "GLM-4.7-Flash": "mlp_layer_types",
    "GLM-5": "indexer_types, mlp_layer_types",
    "Gemma-3-4B": "head_dim",
    "Nemotron-3-Nano-30B-A3B": "layers_block_type",
    "Nemotron-3-Super-120B-A12B": "layers_block_type, mtp_layers_block_type",
    "Nemotron-H-8B": "head_dim, layers_block_type",
    "Qwen3-Coder-Next-E336": "layer_types",
    "Llama-4-Maverick": "moe_layers",
    "Llama-4-Maverick-text": "moe_layers",
    "Llama-4-Scout-text": "moe_layers",
}


def test_the_table_is_that_of_transformers() -> None:
    kept = json.loads(TABLE.read_text())
    assert kept["architectures"] == table()["architectures"], "run python -m tests.support.hf_defaults_table"
    assert kept["architectures"].keys() == {name for family in FAMILIES for name in family.architectures}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_published_models(path: Path) -> None:
    """config.json as published on the Hub; most were written by older releases."""
    written = json.loads(path.read_text())
    family = family_of(written)
    if path.stem in REFUSED:
        with pytest.raises(MissingExtraError, match=f"does not say {REFUSED[path.stem]}"):
            completed(written, family)
        return
    _, expected = read_of(family, family.language_config(filled(written)))
    _, found = read_of(family, family.language_config(completed(written, family)))
    assert found == expected


def test_every_refused_model_is_among_them() -> None:
    assert REFUSED.keys() < {path.stem for path in CONFIGS}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_what_transformers_writes_now(name: str, tmp_path: Path) -> None:
    """A config.json that `save_pretrained` wrote has every field that an export reads."""
    model = TINY_MODELS[name].make()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    family = family_of(written)
    _, expected = read_of(family, family.language_config(model.to_dict()))
    _, found = read_of(family, family.language_config(completed(written, family)))
    assert found == expected


@pytest.mark.parametrize("left_out", ["hidden_size", "rms_norm_eps", "num_key_value_heads", "head_dim", "vocab_size"])
def test_a_number_that_is_left_out_is_never_guessed(left_out: str) -> None:
    written = json.loads(next(path for path in CONFIGS if path.stem == "Qwen3-8B").read_text())
    del written[left_out]
    with pytest.raises(MissingExtraError, match=left_out):
        completed(written, family_of(written))


def test_a_family_that_the_table_lacks_says_how_to_make_it() -> None:
    family = family_of({"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(MissingExtraError, match=r"no defaults of NewForCausalLM.*python -m tests\.support\.hf_def"):
        completed({"architectures": ["NewForCausalLM"]}, family)
