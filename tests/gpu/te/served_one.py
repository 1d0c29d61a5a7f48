"""One rank of a case: its live export is brought back into a new model of Transformer Engine's layers.

    python3 served_one.py OUT CASE        or under torchrun, where the case has several ranks

This is the way from an engine back to training. Status 1 where a tensor that the model exports is not the one that was
brought back. By how much logits differ from the saved ones is printed: weights that were rounded once need not be
rounded by the fake quantizer to the same.
"""

import json
import sys
from pathlib import Path

from cases import CASES
from make_one import differing
from models import build
from training import difference, evaluate, quantize

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.process_ranks import world_rank


def main(out: Path, name: str) -> None:
    case, directory = CASES[name], out / name
    expected = json.loads((directory / "expected.json").read_text())
    again = out / f"{name}.served"
    with megatron.distributed(tp=case.tp, ep=case.ep):
        bridge = AutoBridge.from_hf_pretrained(directory / "live")
        model = build(bridge.hf, case)
        with bridge.open_weights() as weights:
            bridge.load_from(weights, model)
            if case.qat:
                quantize(model, cache=case.cache)
                bridge.load_quant_state(model, weights.state)
        bridge.save_hf_pretrained(model, again, scheme=expected["scheme"], overwrite=True)
        wrong, logits = differing(again, expected["tensors"]), difference(evaluate(model), expected["logits"])
        if world_rank() == 0:
            print(f"{len(wrong)} tensors wrong {wrong[:3]}; logits differ by {logits:.2g}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
