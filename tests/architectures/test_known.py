"""A part of `make architectures CHECK=--check`: the table is what transformers' own models say."""

import pytest

from amaxbridge.export.architectures.facts import KNOWN
from tests.architectures.generate import known, text_of

pytestmark = pytest.mark.slow

KINDS = {
    "LlamaForCausalLM": "a plain decoder",
    "LlamaForCausalLM.exaone": "a model type with another class's modules, and files of its own spelling",
    "GptOssForCausalLM": "packed experts, inputs first, interleaved",
    "GPT2LMHeadModel": "linears with inputs first",
    "DeepseekV32ForCausalLM": "indexers, experts one by one",
    "LlavaForConditionalGeneration": "a tower, and files spelled otherwise than modules",
    "T5ForConditionalGeneration": "an encoder and a decoder that share embeddings",
    "MambaForCausalLM": "recurrent weights",
}


@pytest.mark.parametrize("architecture", KINDS)
def test_the_table_is_what_transformers_says(architecture: str) -> None:
    assert (KNOWN / f"{architecture}.json").read_text() == text_of(known(architecture))


def test_a_wrong_fact_is_a_difference() -> None:
    entry = known("LlamaForCausalLM")
    entry["linear"]["model.layers.*.mlp.up_proj.weight"]["shape"].reverse()
    assert (KNOWN / "LlamaForCausalLM.json").read_text() != text_of(entry)
