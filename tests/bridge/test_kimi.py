"""Kimi-K2-Thinking and K2.5 as published: types with code of their own, and experts in INT4, 32 columns a group.

The codes are made here with a formula of its own and packed by compressed-tensors, so both judge the reader.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

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
from tests.support.paths import PUBLISHED_MODELS, ROOT

GROUP = 32
PUBLISHED: dict[str, Any] = json.loads((PUBLISHED_MODELS / "Kimi-K2.5.json").read_text())["text_config"][
    "quantization_config"
]
"""In Kimi-K2.5 inside the language model's configuration; Kimi-K2-Thinking has the same at the top."""
CODES = (".weight_packed", ".weight_scale", ".weight_shape")


def in_int4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The stored tensors of a weight by local name, and the weight that they mean."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(2) / 7).bfloat16()
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    packed = pack_to_int32(codes.flatten(1).to(torch.int8), num_bits=4)
    shape = torch.tensor(weight.shape, dtype=torch.int32)
    held = {"weight_packed": packed.contiguous(), "weight_scale": scale, "weight_shape": shape}
    return held, (codes * scale.float()[..., None]).flatten(1)


class Kimi(NamedTuple):
    """A tiny Kimi, and what its experts' codes mean, by name of the weight."""

    directory: Path
    meant: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["Kimi-K2-Thinking", "Kimi-K2.5"])
def kimi(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kimi:
    root, images = tmp_path_factory.mktemp("kimi"), request.param == "Kimi-K2.5"
    sizes = {"num_hidden_layers": 2, "q_lora_rank": 32, "n_group": 1, "topk_group": 1}
    sizes |= {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
    plain = make_deepseek_v3(root / "plain", 0, sizes)
    prefix = "language_model." if images else ""
    (directory := root / "int4").mkdir()
    stored, meant = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, tensor in tensors_in(plain).items():
        if ".mlp.experts." in name:
            parts, meant[prefix + name] = in_int4(tensor)
            stored |= {f"{prefix}{module_of(name)}.{local}": part for local, part in parts.items()}
        else:
            stored[prefix + name] = tensor
    for layer in range(2):  # which Kimi's files hold, too
        frequencies = torch.ones(8, dtype=torch.bfloat16)
        stored[f"{prefix}model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies
    config = json.loads((plain / "config.json").read_text())
    classes = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    config |= {"model_type": "kimi_k2", "auto_map": classes, "quantization_config": PUBLISHED}
    if images:
        for name in ("vision_tower.encoder.blocks.0.wqkv.weight", "mm_projector.proj.0.weight"):
            stored[name] = torch.randn(96, 32, dtype=torch.bfloat16)
        config = {
            "architectures": ["KimiK25ForConditionalGeneration"],
            "model_type": "kimi_k25",
            "auto_map": {"AutoConfig": "configuration_kimi_k25.KimiK25Config"},
            "dtype": "bfloat16",
            "text_config": config,
            "tie_word_embeddings": False,
        }
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return Kimi(directory, meant)


def without_frequencies(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors_in(directory).items() if not name.endswith("inv_freq")}


def test_int4_experts_go_through_training(kimi: Kimi, launch: Launcher, tmp_path: Path) -> None:
    """Imported at EP=2 and TP=2, exported from the checkpoint: the same bytes, shapes counted in int64."""
    source, meant = kimi
    assert len(meant) == 24
    for axis in ("ep", "tp"):
        checkpoint, out = tmp_path / axis, tmp_path / f"{axis}_out"
        words = [f"hf={source}", f"output={checkpoint}", f"parallel.{axis}=2"]
        printed = launch(ROOT / "scripts" / "import_hf.py", *words, processes=2)
        assert re.search(r"modules quantized as w4a16\w* +│ +24 ", printed), printed
        assert "bytes will not all come back" not in printed, printed
        AutoBridge.from_hf_pretrained(source).convert_checkpoint(checkpoint, out, scheme="auto")
        found, expected = tensors_in(out), without_frequencies(source)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            shape = name.endswith("weight_shape")
            assert torch.equal(found[name], tensor.long() if shape else tensor), name
            assert found[name].dtype == (torch.int64 if shape else tensor.dtype), name
        assert {each.engine for each in verify(out).verdicts if each.serves} >= {"vllm"}
        written = json.loads((out / "config.json").read_text())
        assert "quantization_config" in written and "quantization_config" not in written.get("text_config", {})


def test_plain_weights_of_int4_experts(kimi: Kimi, tmp_path: Path) -> None:
    source, meant = kimi
    model_free_ptq(source, tmp_path / "plain", "none")
    found = tensors_in(tmp_path / "plain")
    assert found.keys() == {name for name in tensors_in(source) if not name.endswith(CODES)} | meant.keys()
    assert all(torch.equal(found[name], weight.bfloat16()) for name, weight in meant.items())
    model_free_ptq(source, tmp_path / "nvfp4a16", "nvfp4a16")
    model_free_ptq(tmp_path / "plain", tmp_path / "again", "nvfp4a16")
    same_tensors(tmp_path / "nvfp4a16", tmp_path / "again")


def test_the_source_itself_has_no_router_and_no_tower_to_quantize(kimi: Kimi) -> None:
    """No entry of `ignore` names them: routers are bare parameters, and engines leave K2.5's tower out."""
    for engine in ("vllm", "sglang", "transformers", "runtime"):
        failures = verify(kimi.directory).verdict_of(engine).failures
        subjects = [problem.subject for failure in failures for problem in failure.problems]
        assert not [name for name in subjects if name.endswith(".mlp.gate")], engine
        if engine in ("vllm", "sglang"):
            assert not [name for name in subjects if name.startswith(("vision_tower.", "mm_projector."))], engine
    assert verify(kimi.directory).verdict_of("vllm").serves
