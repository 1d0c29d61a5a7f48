"""Configs of FP8, AWQ, GPTQ and MXFP4 sources: every key is known, or refused by name."""

import json
from typing import Any

import pytest
from transformers import AwqConfig, FineGrainedFP8Config, GPTQConfig, Mxfp4Config

from amaxbridge.export.model_free.converters.source_formats import SOURCE_FORMATS
from amaxbridge.mappings.errors import UsageError

FP8 = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}  # fmt: skip
AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": None,
}  # fmt: skip
GPTQ = {
    "bits": 4, "group_size": 128, "damp_percent": 0.1, "desc_act": False, "static_groups": False, "sym": True,
    "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model", "is_marlin_format": False,
    "quant_method": "gptq",
}  # fmt: skip
GPTQMODEL = {
    "bits": 4, "dynamic": {"-:.*shared.*": {}}, "group_size": 128, "desc_act": True, "sym": True, "lm_head": False,
    "quant_method": "gptq", "checkpoint_format": "gptq", "pack_dtype": "int32",
    "meta": {"quantizer": ["gptqmodel:1.7.4"], "uri": "https://github.com/modelcloud/gptqmodel", "damp_percent": 0.1},
}  # fmt: skip
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
PUBLISHED = {"fp8_block": [FP8], "awq": [AWQ], "gptq": [GPTQ, GPTQMODEL], "gpt_oss": [MXFP4]}
"""As DeepSeek-V3.2, AutoAWQ, AutoGPTQ, GPTQModel and GPT-OSS have them."""
CASES = [(name, raw) for name, configs in PUBLISHED.items() for raw in configs]


@pytest.mark.parametrize(("name", "raw"), CASES)
def test_published_configs_are_read(name: str, raw: dict[str, Any]) -> None:
    assert callable(SOURCE_FORMATS[name].reader(raw))
    assert len(CASES) == 5


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("fp8_block", FineGrainedFP8Config()),
        ("awq", AwqConfig()),
        ("gptq", GPTQConfig(bits=4, dataset="c4")),
        ("gpt_oss", Mxfp4Config()),
    ],
)
def test_every_key_of_transformers_is_known(name: str, config: Any) -> None:
    said = json.loads(json.dumps(config.to_dict()))  # as in a file
    assert len(said) >= 2
    assert callable(SOURCE_FORMATS[name].reader(said))


@pytest.mark.parametrize(("name", "raw"), CASES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("of_tomorrow", 3),
        ("rotation", "hadamard"),
        ("adapter", {"name": "lora", "rank": 8}),
        ("is_marlin_format", True),
        ("weights_shuffled", True),
        ("transform_config", {"config_groups": {}}),
    ],
)
def test_a_key_that_says_something_is_refused(name: str, raw: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"config says {key}=.*may change what tensors mean: quantize the checkpoint"):
        SOURCE_FORMATS[name].reader({**raw, key: value})
    for nothing in (None, False, "", [], {}):
        SOURCE_FORMATS[name].reader({**raw, key: nothing})


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("fp8_block", {**FP8, "fmt": "e5m2"}, "FP8's config says fmt='e5m2'"),
        ("fp8_block", {**FP8, "scale_fmt": "e4m3"}, "FP8's config says scale_fmt='e4m3'"),
        ("fp8_block", {**FP8, "expert_dtype": "fp4"}, "FP8's config says expert_dtype='fp4'"),
        ("awq", {**AWQ, "version": "gemv"}, "AWQ in the layout 'gemv' is not read"),
        ("awq", {**AWQ, "format": "marlin"}, "AWQ's config says format='marlin'"),
        ("gptq", {**GPTQMODEL, "pack_dtype": "int8"}, "GPTQ's config says pack_dtype='int8'"),
        ("gptq", {**GPTQMODEL, "dynamic": {"+:.*down.*": {"bits": 8}}}, "GPTQ's config says dynamic="),
        ("gptq", {**GPTQMODEL, "format": "gptq_v2"}, "checkpoint_format and format contradict each other"),
        ("gptq", {**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
    ],
)
def test_a_value_that_changes_the_tensors_is_refused(name: str, raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SOURCE_FORMATS[name].reader(raw)
