"""examples/llama_nemotron.py: layers that differ, from a Megatron checkpoint to Hugging Face's names and shapes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.bridge.plan.dry_run import plan_import, plan_on_mesh
from amaxbridge.bridge.plan.mesh import Mesh
from amaxbridge.mappings.errors import CheckpointError, UsageError
from tests.support.checkpoints import tensors_in
from tests.support.comparing import same_tensors
from tests.support.paths import ROOT
from tests.support.stored_checkpoints import write_state

FAMILY = ROOT / "examples" / "llama_nemotron.py"
HIDDEN, HEADS, GROUPS, DIM, VOCABULARY = 64, 4, 2, 16, 131


def block(width: float | None, *, attention: bool = True) -> dict[str, Any]:
    """A layer as the published files describe it, with the MLP's width as a multiple of the hidden size."""
    group = HEADS // GROUPS if attention else None
    return {
        "attention": {"n_heads_in_group": group, "no_op": not attention, "replace_with_linear": False},
        "ffn": {"ffn_mult": width, "no_op": width is None, "replace_with_linear": False},
    }


CONFIG = {
    "architectures": ["DeciLMForCausalLM"],
    "model_type": "nemotron-nas",
    "attention_bias": False,
    "mlp_bias": False,
    "block_configs": [
        block(5.25),
        block(2.625, attention=False),
        block(None),
        block(None, attention=False),
        block(9.0),
    ],
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": None,
    "max_position_embeddings": 64,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 5,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
}


def width(multiple: float) -> int:
    """Of an MLP, as megatron.core.transformer.heterogeneous computes it of `ffn_mult`."""
    from megatron.core.transformer.heterogeneous.heterogeneous_config import MLPConfig

    return int(MLPConfig.ffn_mult_to_intermediate_size(multiple, HIDDEN))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with random weights, each layer with what its block has."""
    directory, generator = tmp_path_factory.mktemp("nemotron-nas"), torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for number, each in enumerate(CONFIG["block_configs"]):  # type: ignore[arg-type]
        layer = f"model.layers.{number}"
        if not each["attention"]["no_op"]:
            shapes[f"{layer}.input_layernorm.weight"] = (HIDDEN,)
            for name, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
                shapes[f"{layer}.self_attn.{name}_proj.weight"] = (heads * DIM, HIDDEN)
            shapes[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * DIM)
        if not each["ffn"]["no_op"]:
            wide = width(each["ffn"]["ffn_mult"])
            shapes[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
            for name in ("gate", "up"):
                shapes[f"{layer}.mlp.{name}_proj.weight"] = (wide, HIDDEN)
            shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, wide)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


@pytest.fixture(scope="module")
def checkpoint(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as Megatron saves them: what a layer lacks has no name."""
    return write_state(tmp_path_factory.mktemp("megatron"), state(hf))


def state(hf: Path) -> dict[str, Tensor]:
    model, tensors = read_hf_model(hf, FAMILY), tensors_in(hf)
    mappings = [model.registry.hf_to_megatron_lookup(name) for name in tensors]
    found = {mapping.megatron_param: mapping for mapping in mappings if mapping is not None}
    return {name: mapping.split(tensors, model.model_config, 0, 1) for name, mapping in found.items()}


def test_a_checkpoint_becomes_its_weights(hf: Path, checkpoint: Path, tmp_path: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf, family=FAMILY)
    bridge.convert_checkpoint(checkpoint, tmp_path / "out", scheme="none")
    same_tensors(tmp_path / "out", hf)
    assert len(tensors_in(hf)) == 3 + 3 * 5 + 3 * 4
    bridge.convert_checkpoint(checkpoint, tmp_path / "nvfp4a16", scheme="nvfp4a16")
    names = tensors_in(tmp_path / "nvfp4a16").keys()
    assert "model.layers.4.mlp.up_proj.weight_packed" in names and "model.layers.2.mlp.up_proj.weight" not in names


@pytest.mark.parametrize("layer", [0, 1, 2, 4])
def test_a_layer_of_another_block_is_refused(hf: Path, layer: int, tmp_path: Path) -> None:
    """Names and shapes are held against the weights of the directory."""
    other = {name: tensor for name, tensor in state(hf).items() if not name.startswith(f"decoder.layers.{layer}.")}
    bridge = AutoBridge.from_hf_pretrained(hf, family=FAMILY)
    with pytest.raises(CheckpointError, match=rf"decoder\.layers\.{layer}\..*missing"):
        bridge.convert_checkpoint(write_state(tmp_path / "state", other), tmp_path / "out", scheme="none")


def test_it_is_planned_and_not_built(hf: Path, tmp_path: Path) -> None:
    model = read_hf_model(hf, FAMILY)
    plan = plan_on_mesh(model, Mesh.smallest(tp=2, pp=1, vpp=None, ep=1, etp=None), tmp_path / "out", scheme="nvfp4")
    assert len(plan.shares) == 2
    with pytest.raises(UsageError, match="only exported: import does not build layers that differ"):
        plan_import(model, Mesh.smallest(tp=1, pp=1, vpp=None, ep=1, etp=None))


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("attention", "n_heads_in_group", 4, "the same in all layers with attention; found 2, 4"),
        ("attention", "replace_with_linear", True, "a linear layer stands for layer 2: attention"),
        ("ffn", "replace_with_linear", True, "a linear layer stands for layer 2: ffn"),
    ],
)
def test_what_the_file_does_not_map(part: str, field: str, value: Any, message: str, tmp_path: Path) -> None:
    config = json.loads(json.dumps(CONFIG))
    config["block_configs"][2][part][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        read_hf_model(tmp_path, FAMILY)
