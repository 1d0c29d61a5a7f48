"""Real Megatron ranks with adapters of every kind on their linears: merged, written alone, and saved as checkpoints.

    torchrun --nproc-per-node N live_adapters.py HF_DIR OUT_DIR SIZES_JSON

The adapters come from `tests.support.adapters`, the same at every mesh, cut as each rank holds them. ModelOpt's are its
own (`modelopt.torch.peft`).
"""

import json
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import Tensor

from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.live.model_walk import walk_parameters, walk_quantizers
from amaxbridge.bridge.live.process_ranks import current_ranks, world_rank
from amaxbridge.mappings.adapters import Side, adapter_tensor
from amaxbridge.mappings.errors import AmaxbridgeError
from amaxbridge.mappings.names import is_routed_expert
from amaxbridge.mappings.ranks import Axis
from amaxbridge.mappings.tensors import shard_of
from tests.support.adapters import ALPHA, RANK, Adapted, adapters_for
from tests.support.bridge_adapters import fill, wrap_linears
from tests.workers.legacy_save import save_legacy

KINDS = ("lora", "dora", "canonical", "modelopt")


def main(hf: Path, out: Path, sizes: dict[str, int]) -> None:
    bridge = AutoBridge.from_hf_pretrained(hf)
    out.mkdir(parents=True, exist_ok=True)
    with megatron.distributed(**sizes):
        for kind in KINDS:
            model: Any = megatron.build_model(bridge.hf)
            bridge.load_hf_weights(model)
            if kind == "modelopt":
                add_modelopt_adapters(model)
            else:
                wrap_linears(model, kind, RANK, ALPHA)
            fill_adapters(bridge.hf, model, adapters_for(bridge.hf, kind), kind)
            if kind == "lora":
                note_refusals(bridge, model, out)
                streamed = dict(bridge.export_hf_weights(model, adapter="merge"))
                torch.save(streamed, out / f"streamed_{world_rank()}.pt")
            bridge.save_hf_pretrained(model, out / kind, scheme="none", adapter="merge")
            if kind in ("lora", "dora", "canonical"):
                try:
                    bridge.save_hf_pretrained(model, out / f"{kind}_alone", adapter="only")
                except AmaxbridgeError as error:
                    (out / f"{kind}_alone_{world_rank()}.txt").write_text(str(error))
            if "pp" not in sizes:
                megatron.save_checkpoint(model, out / f"{kind}_checkpoint", iteration=3)
            save_legacy(bridge.hf, [model], out / f"{kind}_legacy")
            if kind == "lora" and "pp" not in sizes:
                insert_quantizers(model)
                bridge.save_hf_pretrained(model, out / "nvfp4", adapter="merge")
                megatron.save_checkpoint(model, out / "nvfp4_checkpoint", iteration=3)
                note_packed(bridge, model, out)


def add_modelopt_adapters(model: Any) -> None:
    import modelopt.torch.peft as mtpf

    config = {"rank": RANK, "scale": ALPHA / RANK, "enable": True}
    names = {"*linear_qkv": config, "*linear_proj": config, "*linear_fc1": config, "*linear_fc2": config}
    mtpf.update_model(model, {"adapter_name": "default", "adapter_cfg": names})


def insert_quantizers(model: Any) -> None:
    """NVFP4 outside adapters, with amax that cover the merged weights; those inside are there, and disabled."""
    inside = {"quantizer_name": "*adapter*", "enable": False}
    mtq.quantize(model, {"quant_cfg": [*mtq.NVFP4_DEFAULT_CFG["quant_cfg"], inside], "algorithm": None})
    for quantizer in walk_quantizers([model]):
        quantizer.module.amax = torch.tensor(50.0 if "weight" in quantizer.name else 3.0)


def fill_adapters(hf: HFModel, model: Any, adapted: Adapted, kind: str) -> None:
    """Cuts the adapters as the modules of this rank hold them."""
    ranks, filled = current_ranks(), 0
    for parameter in walk_parameters([model], hf.family.spelling(None)):
        tensor = adapter_tensor(parameter.name)
        if tensor is None:
            continue
        mapping = hf.registry.megatron_to_hf_lookup(tensor.weight)
        assert mapping is not None
        axis = Axis.ETP if is_routed_expert(parameter.name) else Axis.TP
        rank, size = ranks.rank(axis), ranks.size(axis)
        fill(parameter.tensor, shard(hf, mapping, tensor, adapted, kind, rank, size))
        filled += 1
    assert filled >= 4, filled


def shard(hf: HFModel, mapping: Any, tensor: Any, adapted: Adapted, kind: str, rank: int, size: int) -> Tensor:
    row_parallel = mapping.shard_dim == 1
    modules = [target.removesuffix(".weight") for role, target in mapping.roles.items() if tensor.role in ("", role)]
    if tensor.side is Side.A:
        whole = adapted.a[modules[0]]
        return shard_of(whole, 1 if row_parallel else None if kind == "modelopt" else 0, rank, size)
    parts = adapted.b if tensor.side is Side.B else adapted.lengths
    if row_parallel:
        dim = 0 if tensor.side is Side.B and kind != "modelopt" else None
        return shard_of(parts[modules[0]], dim, rank, size)
    if tensor.role:
        return shard_of(parts[modules[0]], 0, rank, size)
    tensors = {target: parts[target.removesuffix(".weight")] for target in mapping.targets}
    found: Tensor = mapping.split(tensors, hf.model_config, rank, size)
    return found


def note_refusals(bridge: AutoBridge, model: Any, out: Path) -> None:
    """The messages of every rank, where the reason is on the last rank alone."""
    refusals = {}
    last = world_rank() == current_ranks().size(Axis.WORLD) - 1
    wrapped = next(module for name, module in model.named_modules() if name.endswith("linear_proj"))

    def attempt(name: str, **options: Any) -> None:
        try:
            bridge.save_hf_pretrained(model, out / "refused", scheme="none", **options)
        except AmaxbridgeError as error:
            refusals[name] = str(error)

    attempt("default")
    attempt("alpha", adapter="merge", adapter_alpha=77.0)
    wrapped._adapter_enabled = not last
    attempt("disabled", adapter="merge")
    wrapped._adapter_enabled = True
    (out / f"refusals_{world_rank()}.json").write_text(json.dumps(refusals))


def note_packed(bridge: AutoBridge, model: Any, out: Path) -> None:
    """Weights of codes beside adapters: no merge, but the adapters can be written."""
    mtq.compress(model)
    bridge.save_hf_pretrained(model, out / "packed_alone", adapter="only")
    try:
        bridge.save_hf_pretrained(model, out / "packed", adapter="merge")
    except AmaxbridgeError as error:
        (out / f"packed_{world_rank()}.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
