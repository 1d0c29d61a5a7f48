"""One rank of a case: its checkpoint is loaded into a new model, which is evaluated, trained one step more, evaluated.

    python3 reload_one.py OUT CASE        or under torchrun, where the case has several ranks

Status 1 where a logit is not the saved one. After the step of training, what differs is printed only: a GPU adds the
gradients of an embedding in no fixed order.
"""

import json
import sys
from pathlib import Path

from cases import CASES
from models import build
from training import ITERATION, difference, evaluate, tokens_of_step, train_step

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.process_ranks import world_rank


def main(out: Path, name: str) -> None:
    case, directory = CASES[name], out / name
    expected = json.loads((directory / "expected.json").read_text())
    with megatron.distributed(tp=case.tp, ep=case.ep):
        model = build(AutoBridge.from_hf_pretrained(directory).hf, case)
        megatron.load_checkpoint(model, directory / "checkpoint")
        reloaded = difference(evaluate(model), expected["logits"])
        train_step(model, tokens_of_step(ITERATION))
        continued = difference(evaluate(model), expected["continued"])
        if world_rank() == 0:
            print(f"logits differ by {reloaded:.2g} as loaded, by {continued:.2g} after one more step")
    sys.exit(reloaded != 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
