"""A real Megatron MoE model with ModelOpt's quantizers that is saved, and loaded again by a ModelOpt that loses amax.

    torchrun --nproc-per-node 1 live_reload.py HF_DIR OUT_DIR SIZES_JSON

ModelOpt 0.47 gives the experts of a grouped linear no amax but the first one's, and a grouped linear needs a GPU
(`tests/gpu/te`). Here the experts are a module each, and lose theirs when `restore_sharded_modelopt_state` returns.
`outcomes.json` has what loading said, and whether the model is the one that was saved.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.model_walk import walk_quantizers
from amaxbridge.bridge.megatron import megatron_checkpoint
from amaxbridge.mappings.errors import CheckpointError
from tests.workers.live_moe import insert_quantizers, set_amax_from_names

_restore = megatron_checkpoint.restore_sharded_modelopt_state


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    with megatron.distributed(**sizes):
        model = megatron.build_model(bridge.hf)
        bridge.load_hf_weights(model)
        insert_quantizers(model)
        set_amax_from_names([model])
        megatron.save_checkpoint(model, out / "saved", iteration=1)
        expected = amax_of(model)
        outcomes = {}
        for name, lose in {"as it is": nothing, "experts": of_experts, "all": of_all, "quantizers": modules}.items():
            megatron_checkpoint.restore_sharded_modelopt_state = and_then(lose)  # type: ignore[attr-defined]
            reloaded = megatron.build_model(bridge.hf)
            try:
                megatron.load_checkpoint(reloaded, out / "saved")
            except CheckpointError as error:
                outcomes[name] = str(error)
            else:
                outcomes[name] = "the same" if amax_of(reloaded) == expected else "other amax"
        plain = megatron.build_model(bridge.hf)
        megatron_checkpoint.restore_sharded_modelopt_state = lambda *_: None  # type: ignore[attr-defined]
        try:
            megatron.load_checkpoint(plain, out / "saved")
        except CheckpointError as error:
            outcomes["no quantizers"] = str(error)
        (out / "outcomes.json").write_text(json.dumps({"amax": len(expected), **outcomes}))


def and_then(lose: Callable[[Any], None]) -> Callable[..., None]:
    def restore(chunks: list[Any], directory: Path) -> None:
        _restore(chunks, directory)
        lose(chunks[0])

    return restore


def nothing(model: Any) -> None:
    del model


def of_experts(model: Any) -> None:
    """Removes amax as ModelOpt 0.47 does in a grouped linear."""
    for quantizer in walk_quantizers([model]):
        if quantizer.name.rpartition(".")[2] in ("1", "2", "3"):
            del quantizer.module._amax


def of_all(model: Any) -> None:
    for quantizer in walk_quantizers([model]):
        del quantizer.module._amax


def modules(model: Any) -> None:
    model.decoder.layers[0].self_attention.linear_qkv.weight_quantizer = torch.nn.Identity()


def amax_of(model: Any) -> dict[str, float]:
    return {each.name: float(each.module._amax) for each in walk_quantizers([model])}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
