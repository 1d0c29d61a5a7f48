"""Real Megatron ranks that load Hugging Face models, compare their logits, and export them back.

    torchrun --nproc-per-node N live_parity.py CASES_JSON OUT_JSON

CASES_JSON is a list of {"hf": directory, "back": where to export to, "sizes": arguments of `megatron.distributed`,
"model_class": that of `megatron.build_model`}, all for
N processes; beside the model lie the logits of transformers. All cases run in one process group, because starting
one costs more than a case. Everything is fp32. What goes to `back` is plain; in `back/nvfp4` all quantizers have the
same amax, as names are all that is of interest there. `back_checkpoint` is the plain model with its arguments, as
Megatron saves it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.model_walk import layer_pattern, walk_parameters, walk_quantizers
from amaxbridge.bridge.live.process_ranks import current_ranks, process_group, world_rank
from amaxbridge.bridge.stored.saved_arguments import megatron_arguments
from amaxbridge.mappings.ranks import Axis
from tests.support.without_fla import without_fla
from tests.workers.model import forward


def main(cases: list[dict[str, Any]], out: Path) -> None:
    with process_group(), without_fla():
        found = [run(Path(case["hf"]), Path(case["back"]), case["sizes"], case["model_class"]) for case in cases]
    if world_rank() == 0:
        out.write_text(json.dumps(found))


def run(hf: Path, back: Path, sizes: dict[str, int], model_class: Any) -> dict[str, Any]:
    """What one case found, over all ranks.

    `logits` are the relative norm and the largest of the differences, `names` all Megatron names, `exported` all names
    that they became, experts one by one, `quantizers` those of the quantizers that ModelOpt then puts in.
    """
    bridge = AutoBridge.from_hf_pretrained(hf)
    with megatron.distributed(**sizes):
        model = megatron.build_model(bridge.hf, dtype=torch.float32, model_class=model_class)
        bridge.load_hf_weights(model)
        bridge.save_hf_pretrained(model, back, scheme="none")
        arguments = megatron_arguments(bridge.hf, model.config, layer_pattern([model]))
        megatron.save_checkpoint(model, Path(f"{back}_checkpoint"), iteration=1, arguments=arguments)
        exported = [name for name, _ in bridge.export_hf_weights(model)]
        spelling = bridge.hf.family.spelling(layer_pattern([model]))
        names = [parameter.name for parameter in walk_parameters([model], spelling)]
        ranks = current_ranks()
        logits = compare(forward(model), torch.load(hf / "logits.pt"))
        mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG)
        quantizers = list(walk_quantizers([model], spelling))
        for quantizer in quantizers:
            quantizer.module.amax = torch.tensor(1.0)
        bridge.save_hf_pretrained(model, back / "nvfp4")
        return {
            "names": _gather(ranks, names),
            "exported": _gather(ranks, exported),
            "quantizers": _gather(ranks, [quantizer.name for quantizer in quantizers]),
            "logits": logits,
        }


def compare(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    difference = found - expected
    return {"relative": float(difference.norm() / expected.norm()), "largest": float(difference.abs().max())}


def _gather(ranks: Any, names: list[str]) -> list[str]:
    return sorted({name for rank in ranks.all_gather_object(Axis.WORLD, names) for name in rank})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
