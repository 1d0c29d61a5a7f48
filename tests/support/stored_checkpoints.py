"""Distributed checkpoints of any family, written without Megatron: random tensors of the shapes that mappings give."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, save

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.plan.tensor_specs import MegatronSpecs
from amaxbridge.mappings.hybrid_layers import read_pattern


def megatron_state(hf: HFModel, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Every parameter of a model layer by layer, as Megatron names it in a checkpoint of one rank."""
    specs = MegatronSpecs(hf, hf.model_config)
    generator = torch.Generator().manual_seed(23)
    spelled = spelling(hf)
    state = {}
    for name in sorted(specs.mappings.keys() - hf.without_tensor):
        tensor = torch.randn(specs.shard(name, 1).shape, generator=generator) * 0.05
        state[spelled(name)] = tensor if "expert_bias" in name else tensor.to(dtype)
    return state


def write_state(directory: Path, state: Mapping[str, Tensor]) -> Path:
    """A checkpoint of these tensors, in a directory as training's `--save`."""
    iteration = directory / "iter_0000005"
    iteration.mkdir(parents=True)
    (directory / "latest_checkpointed_iteration.txt").write_text("5")
    save(dict(state), storage_writer=FileSystemWriter(iteration), no_dist=True)
    return directory


def spelling(hf: HFModel) -> Callable[[str], str]:
    """The mappings' names → those in a checkpoint; only those that `canonical` does not take as they are."""
    hybrid = hf.family.hybrid_pattern is not None
    decoder = read_pattern(hf.family.layer_pattern(hf.config)).decoder if hybrid else ""

    def spelled(name: str) -> str:
        experts, found, expert = name.partition(".experts.linear_fc")
        if found:
            number, _, kind = expert.partition(".")
            kind, index = kind.rstrip("0123456789"), kind[len(kind.rstrip("0123456789")) :]
            name = f"{experts}.experts.experts.{index}.linear_fc{number}.{kind}"
        if decoder and name == "decoder.final_layernorm.weight":
            return "decoder.final_norm.weight"
        if hf.family.paired and name.startswith("decoder.layers."):
            _, _, layer, module, *rest = name.split(".")
            number = 2 * int(layer) + (module in ("mlp", "pre_mlp_layernorm"))
            module = "norm" if module == "input_layernorm" and decoder[number] == "M" else module
            return ".".join(["decoder.layers", str(number), module, *rest])
        if decoder and name.startswith("decoder.layers.") and name.endswith(".norm.weight") and "mixer" not in name:
            letter = decoder[int(name.split(".")[2])]
            norm = {"M": "norm", "*": "input_layernorm"}.get(letter, "pre_mlp_layernorm")
            return name.replace(".norm.", f".{norm}.")
        return name

    return spelled
