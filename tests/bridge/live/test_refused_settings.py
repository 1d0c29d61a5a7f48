"""Settings of real ModelOpt quantizers that no export writes: named, live and from the checkpoint, in every case."""

from typing import Any

import pytest

from tests.support.hf_models import make_qwen3
from tests.support.launcher import Launcher, LiveRanks
from tests.workers.live_refused import CACHES, CASES

LINEAR = "decoder.layers.0.mlp.linear_fc2"
UNKNOWN = "amaxbridge does not know it, so it may change values"
CACHE = "quantizers of the key-value cache have no place in format=compressed-tensors"
LIVE = {
    "attribute": f"{LINEAR}.weight_quantizer: _of_tomorrow=3: {UNKNOWN}",
    "attribute_of_a_disabled_one": f"{LINEAR}.output_quantizer: _of_tomorrow=3: {UNKNOWN}",
    "buffer": f"{LINEAR}.weight_quantizer: _of_tomorrow=a tensor [3]: {UNKNOWN}",
    "buffer_of_a_disabled_one": f"{LINEAR}.output_quantizer: _of_tomorrow=a tensor [3]: {UNKNOWN}",
    "parameter": f"{LINEAR}.input_quantizer: _of_tomorrow=a tensor [3]: {UNKNOWN}",
    "module_inside": f"{LINEAR}.input_quantizer: _modules=",
    "bias": f"{LINEAR}.input_quantizer: _bias_value=a tensor [1]: subtracts a bias",
    "rotation": f"{LINEAR}.weight_quantizer: _rotate=True: a Hadamard transform",
    "rotation_of_a_disabled_one": "core_attention.q_bmm_quantizer: _rotate=True: a Hadamard transform",
    "module_with_such_a_name": f"parameters have no mapping:\n  {LINEAR}.codebook_quantizer.weight",
    "compress_int8": "_fake_quant=False: the weight itself is stored as codes (mtq.compress)",
    "svdquant": "_svdquant_lora_a=a tensor [4, ",
    "cache_int8_per_head": "model.layers.0.self_attn.k_bmm_quantizer: int8 axis=2",
    "cache_per_token": "model.layers.0.self_attn.k_bmm_quantizer: e4m3 per token",
    "cache_dynamic": "model.layers.0.self_attn.k_bmm_quantizer: e4m3 per tensor, dynamic",
    "cache_nvfp4": "model.layers.0.self_attn.k_bmm_quantizer: nvfp4, which engines read from format=modelopt alone",
    "cache_int8": "model.layers.0.self_attn.k_bmm_quantizer: int8 per tensor",
}
"""Case → a part of the message."""
STORED = LIVE | {
    "module_inside": f"{LINEAR}.input_quantizer.of_tomorrow",
    "module_with_such_a_name": f"{LINEAR}.codebook_quantizer",
    "compress_int8": "the weight was packed by ModelOpt (mtq.compress) as INT8QTensor",
}
"""Where a checkpoint says less than the model."""
ONLY_QUANTIZED = {"bias", *CACHES}
"""What only acts on values that an export with scheme=none does not write."""


@pytest.fixture(scope="module")
def report(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    hf = tmp_path_factory.mktemp("refused_model")
    make_qwen3(hf)
    found = LiveRanks(launch, "live_refused.py", hf, tmp_path_factory.mktemp("refused")).report()
    assert found.keys() == CASES.keys() == LIVE.keys()
    return found


@pytest.mark.parametrize("scheme", ["auto", "none"])
@pytest.mark.parametrize("source", ["live", "stored"])
@pytest.mark.parametrize("case", LIVE)
def test_it_is_named_or_does_not_matter(report: dict[str, Any], case: str, source: str, scheme: str) -> None:
    message = report[case][f"{source} {scheme}"]
    if scheme == "none" and case in ONLY_QUANTIZED:
        assert message == "written"
        return
    assert (LIVE if source == "live" else STORED)[case] in message
    assert "\n" in message.strip(), "the next step"
    assert (CACHE in message) is (case in CACHES)
