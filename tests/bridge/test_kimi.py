"""Kimi-K2 as it is published: a `model_type` with code of its own, and experts in INT4, 32 columns a group.

The codes are made here with a formula of its own and packed by compressed-tensors, so both judge the reader.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.export import model_free_ptq
from amaxbridge.export.verify import verify
from amaxbridge.mappings.names import module_of
from tests.support.checkpoints import tensors_in
from tests.support.comparing import same_tensors
from tests.support.hf_models import make_deepseek_v3
from tests.support.launcher import Launcher
from tests.support.paths import ROOT

GROUP = 32
PUBLISHED: dict[str, Any] = {  # the quantization_config of Kimi-K2.5's language model, Kimi-K2-Thinking's likewise
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": GROUP,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}


def in_int4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The stored tensors of a weight by local name, and the weight that they mean."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(2) / 7).bfloat16()
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    packed = pack_to_int32(codes.flatten(1).to(torch.int8), num_bits=4)
    shape = torch.tensor(weight.shape, dtype=torch.int32)
    held = {"weight_packed": packed.contiguous(), "weight_scale": scale, "weight_shape": shape}
    return held, (codes * scale.float()[..., None]).flatten(1)


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny Kimi-K2-Thinking, and what its experts' codes mean."""
    root = tmp_path_factory.mktemp("kimi")
    sizes = {"num_hidden_layers": 2, "q_lora_rank": 32, "n_group": 1, "topk_group": 1}
    sizes |= {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
    plain = make_deepseek_v3(root / "plain", 0, sizes)
    (directory := root / "int4").mkdir()
    stored, meant = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, tensor in tensors_in(plain).items():
        if ".mlp.experts." in name:
            parts, meant[name] = in_int4(tensor)
            stored |= {f"{module_of(name)}.{local}": part for local, part in parts.items()}
        else:
            stored[name] = tensor
    for layer in range(2):  # which Kimi's files hold, too
        stored[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8, dtype=torch.bfloat16)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    classes = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    config |= {"model_type": "kimi_k2", "auto_map": classes, "quantization_config": PUBLISHED}
    (directory / "config.json").write_text(json.dumps(config))
    return directory, meant


def without_frequencies(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors_in(directory).items() if not name.endswith("inv_freq")}


def test_int4_experts_go_through_training(
    kimi: tuple[Path, dict[str, torch.Tensor]], launch: Launcher, tmp_path: Path
) -> None:
    """Imported at EP=2 and TP=2, exported from the checkpoint: the same bytes, shapes counted in int64."""
    source, meant = kimi
    assert len(meant) == 24
    for axis in ("ep", "tp"):
        checkpoint, out = tmp_path / axis, tmp_path / f"{axis}_out"
        words = [f"hf={source}", f"output={checkpoint}", f"parallel.{axis}=2"]
        printed = launch(ROOT / "scripts" / "import_hf.py", *words, processes=2)
        assert re.search(r"modules quantized as w4a16\w* +│ +24 ", printed), printed
        assert re.search(r"bytes will not all come back +│ +0 ", printed), printed
        AutoBridge.from_hf_pretrained(source).convert_checkpoint(checkpoint, out, scheme="auto")
        found, expected = tensors_in(out), without_frequencies(source)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            shape = name.endswith("weight_shape")
            assert torch.equal(found[name], tensor.long() if shape else tensor), name
            assert found[name].dtype == (torch.int64 if shape else tensor.dtype), name
        assert {each.engine for each in verify(out).verdicts if each.serves} >= {"vllm"}


def test_plain_weights_of_int4_experts(kimi: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    source, meant = kimi
    model_free_ptq(source, tmp_path / "plain", "none")
    found = tensors_in(tmp_path / "plain")
    codes = (".weight_packed", ".weight_scale", ".weight_shape")
    assert found.keys() == {name for name in tensors_in(source) if not name.endswith(codes)} | meant.keys()
    assert all(torch.equal(found[name], weight.bfloat16()) for name, weight in meant.items())
    model_free_ptq(source, tmp_path / "nvfp4a16", "nvfp4a16")
    model_free_ptq(tmp_path / "plain", tmp_path / "again", "nvfp4a16")
    same_tensors(tmp_path / "nvfp4a16", tmp_path / "again")


def test_the_source_itself_is_served_by_vllm(kimi: tuple[Path, dict[str, torch.Tensor]]) -> None:
    assert {each.engine for each in verify(kimi[0]).verdicts if each.serves} >= {"vllm"}
