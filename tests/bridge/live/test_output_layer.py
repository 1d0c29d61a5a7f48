"""Quantized output layers: exported as ModelOpt's fake quantizers compute, or refused where the embedding is tied."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from amaxbridge.bridge import AutoBridge
from amaxbridge.export.schemes import SCHEMES, scheme_of
from amaxbridge.export.schemes.signature import Signature
from amaxbridge.export.schemes.targets import is_targeted
from amaxbridge.export.verify import verify
from amaxbridge.mappings.errors import UsageError
from tests.support.checkpoints import tensors_in
from tests.support.hf_models import make_qwen3
from tests.support.launcher import Launcher, LiveRanks

CASES = {"fp8": ("fp8", "fp8"), "nvfp4_beside_fp8": ("nvfp4", "fp8"), "weight_only": ("nvfp4a16", "nvfp4a16")}
"""Case → schemes of the output layer and of the other modules."""


@pytest.fixture(scope="module")
def ranks(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    hf = tmp_path_factory.mktemp("head_model")
    make_qwen3(hf)
    return LiveRanks(launch, "live_head.py", hf, tmp_path_factory.mktemp("head"))


@pytest.fixture(scope="module")
def tied(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    hf = tmp_path_factory.mktemp("tied_head_model")
    make_qwen3(hf)
    tensors = tensors_in(hf)
    del tensors["lm_head.weight"]
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return LiveRanks(launch, "live_head.py", hf, tmp_path_factory.mktemp("tied_head"))


def written_schemes(directory: Path, modules: list[str]) -> list[str]:
    config: Any = json.loads((directory / "config.json").read_text())["quantization_config"]
    found = []
    for module in modules:
        (group,) = [each for each in config["config_groups"].values() if is_targeted(module, each["targets"])]
        scheme = scheme_of(Signature.of(group, config["format"]))
        assert scheme is not None
        assert module not in config["ignore"]
        found.append(scheme.name)
    return found


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_fake_quantizers(ranks: LiveRanks, case: str) -> None:
    directory, (head, others) = ranks.at(tp=1), CASES[case]
    written, expected = tensors_in(directory / case), load_file(directory / f"{case}.safetensors")
    modules = [name.removesuffix(".weight.fake") for name in expected if name.endswith(".fake")]
    assert len(modules) == 15
    assert written_schemes(directory / case, ["lm_head", "model.layers.0.mlp.up_proj"]) == [head, others]
    for module in modules:
        scheme, prefix = SCHEMES[head if module == "lm_head" else others], f"{module}."
        local = {name.removeprefix(prefix): each for name, each in written.items() if name.startswith(prefix)}
        rounding = 2**-7 if scheme.name == "fp8" else 0  # ModelOpt divides by 448 / amax
        torch.testing.assert_close(scheme.dequantize(local), expected[f"{module}.weight.fake"], rtol=rounding, atol=0)
    assert verify(directory / case).verdict_of("vllm").serves


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_gives_the_same_bytes(ranks: LiveRanks, tmp_path: Path, case: str, tp: int) -> None:
    directory, bridge = ranks.at(tp=tp), AutoBridge.from_hf_pretrained(ranks.hf)
    bridge.convert_checkpoint(directory / f"checkpoint_{case}", tmp_path / "out", scheme="auto")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (directory / case / name).read_bytes(), name


@pytest.mark.parametrize("case", CASES)
def test_a_tied_one_is_refused_live_and_stored(tied: LiveRanks, tmp_path: Path, case: str) -> None:
    """The embedding has no place for scales; ignoring the layer writes the embedding that training holds."""
    directory, bridge = tied.at(tp=1), AutoBridge.from_hf_pretrained(tied.hf)
    message = tied.report()[case]
    head = {"fp8": "fp8", "nvfp4_beside_fp8": "nvfp4", "weight_only": "nvfp4"}[case]
    assert f"what scheme=auto writes unquantized:\n  lm_head: weights {head}" in message
    with pytest.raises(UsageError) as refusal:
        bridge.convert_checkpoint(directory / f"checkpoint_{case}", tmp_path / "refused", scheme="auto")
    assert str(refusal.value) == message
    bridge.convert_checkpoint(directory / f"checkpoint_{case}", tmp_path / "out", scheme="auto", ignore=["lm_head"])
    written, source = tensors_in(tmp_path / "out"), tensors_in(tied.hf)
    assert torch.equal(written["model.embed_tokens.weight"], source["model.embed_tokens.weight"])
