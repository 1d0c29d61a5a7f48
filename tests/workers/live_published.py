"""Megatron models of published size on the meta device, and the plan of their export.

    python live_published.py OUT_JSON MODEL [MODEL …]

Every parameter of the real model is there and none of its bytes: DeepSeek-V3, 61 layers of 256 experts, takes seconds.
"""

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.hf import HFModel
from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.families import family_of
from tests.support.paths import PUBLISHED_MODELS
from tests.support.published_models import configured
from tests.support.without_fla import without_fla


def main(out: Path, models: Sequence[str]) -> None:
    gc.disable()  # a hundred thousand modules, all of them in use
    with megatron.distributed(tp=1), without_fla():
        plans = {name: plan(PUBLISHED_MODELS / f"{name}.json", out.parent / "unwritten") for name in models}
    out.write_text(json.dumps(plans))


def plan(file: Path, unwritten: Path) -> dict[str, tuple[int, ...]] | str:
    """The tensors that an export would write: name → shape. Or why Megatron does not build the model."""
    written = json.loads(file.read_text())
    filled = configured(written).to_dict()
    bridge = AutoBridge(HFModel(file.with_suffix(""), written, filled, family_of(written)))
    try:
        with torch.device("meta"):
            model = megatron.build_model(bridge.hf, initialize=False)
    except UsageError as error:
        return str(error)
    report = bridge.save_hf_pretrained(model, unwritten, scheme="none", dry_run=True)
    return {name: spec.shape for shard in report.layout.shards for name, spec in shard.specs.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
