"""Nemotron 3 Super and Ultra: latent experts, an MTP layer that training repeats, and ModelOpt's recipes for them."""

import json
from pathlib import Path

import pytest

from amaxbridge.bridge.auto import AutoBridge
from amaxbridge.bridge.stored.config_from_arguments import model_of_arguments
from amaxbridge.export.quant_config import read_quant_config
from amaxbridge.export.verify import verify
from amaxbridge.mappings.names import module_of
from tests.support.checkpoints import tensors_in
from tests.support.comparing import same_tensors
from tests.support.hard_weights import same_bytes
from tests.support.launcher import Launcher
from tests.support.paths import WORKERS
from tests.support.tiny_models import NEMOTRON_H, config

ULTRA = "NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16/ptq/nvfp4-4o6"
LIGHTNING = "NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16/ptq/w4a16_nvfp4_4o6"
SUPER = "NVIDIA-Nemotron-3-Super-120B-A12B-BF16/ptq/nvfp4-max-calib"
SCHEMES = {  # recipe → the schemes of routed experts, shared experts, Mamba's projections
    ULTRA: ("nvfp4", "fp8", "fp8"),
    LIGHTNING: ("nvfp4a16", "nvfp4a16", "fp8"),
    SUPER: ("nvfp4", "fp8", "fp8"),
}


@pytest.fixture(scope="module")
def exported(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What ranks exported: TP → directory."""
    import modelopt_recipes

    root = tmp_path_factory.mktemp("nemotron3")
    mtp = {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["full_attention", "moe"], "dtype": "bfloat16"}
    config("NemotronHForCausalLM", **NEMOTRON_H, moe_latent_size=32, **mtp)().save_pretrained(root / "HF")
    recipes = Path(modelopt_recipes.__file__).parent / "models" / "nvidia"
    for tp, chosen in ((1, list(SCHEMES)), (2, [SUPER])):  # ModelOpt calibrates static blocks at TP=1 only
        files = [recipes / f"{recipe}.yaml" for recipe in chosen]
        launch(WORKERS / "live_nemotron3.py", root / "HF", root / str(tp), tp, *files, processes=tp)
    return {tp: root / str(tp) for tp in (1, 2)}


def test_a_repeated_layer_is_in_the_files_once(exported: dict[int, Path]) -> None:
    names = tensors_in(exported[1] / "plain").keys()
    layers = {name.split(".")[2] for name in names if name.startswith("mtp.")}
    assert layers == {"0", "1"}
    assert "mtp.layers.1.mixer.fc1_latent_proj.weight" in names
    assert "backbone.layers.3.mixer.fc2_latent_proj.weight" in names


@pytest.mark.parametrize("recipe", SCHEMES)
def test_a_recipe_of_modelopt(recipe: str, exported: dict[int, Path], tmp_path: Path) -> None:
    """Each module in the recipe's format; the checkpoint and an import give the same tensors; engines serve it."""
    place = exported[1] / recipe.rpartition("/")[2]
    written = json.loads((place / "live" / "config.json").read_text())
    quantization = read_quant_config(written["quantization_config"]).checked()
    modules = {
        "backbone.layers.3.mixer.experts.5.up_proj": SCHEMES[recipe][0],
        "backbone.layers.3.mixer.experts.0.down_proj": SCHEMES[recipe][0],
        "backbone.layers.3.mixer.shared_experts.up_proj": SCHEMES[recipe][1],
        "backbone.layers.0.mixer.in_proj": SCHEMES[recipe][2],
        "backbone.layers.4.mixer.out_proj": SCHEMES[recipe][2],
        "backbone.layers.2.mixer.q_proj": None,
        "backbone.layers.3.mixer.fc1_latent_proj": None,
        "backbone.layers.3.mixer.fc2_latent_proj": None,
        "backbone.layers.3.mixer.gate": None,
    }
    found = {module: quantization.scheme_of(module) for module in modules}
    assert {module: scheme and scheme.name for module, scheme in found.items()} == modules
    assert verify(place / "live", reference=exported[1] / "plain").ok
    hf = model_of_arguments(place / "checkpoint")
    assert hf.written["num_nextn_predict_layers"] == 1
    assert hf.config["moe_latent_size"] == 32
    AutoBridge(hf).convert_checkpoint(place / "checkpoint", tmp_path / "out", scheme="auto")
    same_tensors(tmp_path / "out", place / "live")
    left, changed = json.loads((place / "imported.json").read_text())
    assert left == []
    live, back = tensors_in(place / "live"), tensors_in(place / "back")
    assert live.keys() == back.keys()
    others = {module_of(name) for name in live if not same_bytes(live[name], back[name])}
    assert others <= set(changed)  # an import has no quantizer that chooses between four and six
    assert (len(others) > 0) == ("4o6" in recipe)


def test_tensor_parallel_ranks_keep_latents_whole(exported: dict[int, Path]) -> None:
    """Random weights differ between topologies, so each is held against its own plain export."""
    assert verify(exported[2] / SUPER.rpartition("/")[2] / "live", reference=exported[2] / "plain").ok
    shapes = [{name: tensor.shape for name, tensor in tensors_in(exported[tp] / "plain").items()} for tp in (1, 2)]
    assert shapes[0] == shapes[1]
