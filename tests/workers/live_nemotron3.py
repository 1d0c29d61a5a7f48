"""A Nemotron 3 with latent experts and a repeated MTP layer in Megatron, quantized by the recipe files of ModelOpt.

    torchrun --nproc-per-node N live_nemotron3.py HF_DIR OUT_DIR TP RECIPE...

HF_DIR has config.json alone. Training repeats its one MTP layer for two tokens (`--mtp-use-repeated-layer`). OUT_DIR
gets the random weights as `plain`, and for each recipe `NAME/live`, `NAME/checkpoint` and, from one process,
`NAME/back`: what an import of `live` exports.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.recipe import load_recipe

from amaxbridge.bridge import AutoBridge, import_hf, megatron
from amaxbridge.bridge.hf import read_hf_model
from amaxbridge.bridge.live.model_walk import layer_pattern
from amaxbridge.bridge.stored.saved_arguments import megatron_arguments
from amaxbridge.mappings.family import fixed
from tests.workers.model import calibrate

REPEATS = 2


def main(hf: Path, out: Path, tp: int, recipes: list[str]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    with megatron.distributed(tp=tp):
        for recipe in [None, *recipes]:
            torch.manual_seed(5)
            model = trained(bridge)
            if recipe is None:
                bridge.save_hf_pretrained(model, out / "plain", scheme="none")
                continue
            bridge.hf = read_hf_model(out / "plain")
            bridge.load_hf_weights(model)
            quantize(model, recipe)
            place = out / Path(recipe).stem
            bridge.save_hf_pretrained(model, place / "live", scheme="auto")
            arguments = megatron_arguments(bridge.hf, model.config, layer_pattern([model]))
            arguments.mtp_num_layers, arguments.mtp_use_repeated_layer = REPEATS, True
            decoder, mtp = arguments.hybrid_layer_pattern.split("/")
            arguments.hybrid_layer_pattern = "/".join([decoder, *[mtp] * REPEATS])
            megatron.save_checkpoint(model, place / "checkpoint", iteration=1, arguments=arguments)
            if tp == 1:
                imported = import_hf.import_hf(read_hf_model(place / "live"), place / "imported")
                (place / "imported.json").write_text(json.dumps([list(imported.left), list(imported.changed)]))
                bridge.convert_checkpoint(place / "imported", place / "back", scheme="auto")


def trained(bridge: AutoBridge) -> Any:
    """The model as training builds it: one MTP layer, applied twice."""
    hf = bridge.hf
    config = {**hf.config, "num_nextn_predict_layers": REPEATS}
    family = replace(hf.family, layers={**hf.family.layers, "mtp_use_repeated_layer": fixed(True)})
    model = megatron.build_model(replace(hf, filled=config, family=family), dtype=torch.float32)
    assert len(model.mtp.layers) == 1 and model.config.mtp_num_layers == REPEATS
    return model


def quantize(model: Any, recipe: str) -> None:
    config = load_recipe(Path(recipe)).quantize.model_dump()
    with megatron.cache_quantizers():
        mtq.quantize(model, config, calibrate)
    model.bfloat16()
    for module in model.modules():
        if getattr(module, "expert_bias", None) is not None:
            module.expert_bias = module.expert_bias.float()  # as Megatron keeps it


if __name__ == "__main__":
    hf, out, tp, *recipes = sys.argv[1:]
    main(Path(hf), Path(out), int(tp), recipes)
