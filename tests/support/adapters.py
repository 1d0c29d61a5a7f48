"""Random adapters on the linears of a checkpoint, in every spelling, and PEFT's own merge as the oracle."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from amaxbridge.bridge.hf import HFModel
from amaxbridge.bridge.plan.tensor_specs import MegatronSpecs
from amaxbridge.mappings.mapping import MegatronParamMapping
from tests.support.stored_checkpoints import spelling

RANK, ALPHA = 4, 6.0
LINEARS = re.compile(
    r".*\.(?:linear_(?:qkv|proj|fc1|fc2|q_proj|q_down_proj|q_up_proj|kv_down_proj|kv_up_proj)|mixer\.(?:in|out)_proj)"
    r"\.weight\d*"
)


@dataclass
class Adapted:
    """Adapters in Megatron's spelling, and the same taken apart: Hugging Face module → its parts."""

    megatron: dict[str, Tensor] = field(default_factory=dict)
    a: dict[str, Tensor] = field(default_factory=dict)
    b: dict[str, Tensor] = field(default_factory=dict)
    lengths: dict[str, Tensor] = field(default_factory=dict)


def adapters_for(hf: HFModel, kind: str, *, dtype: torch.dtype = torch.bfloat16, rank: int = RANK) -> Adapted:
    """Random adapters of all linears: kind is lora, dora, canonical or modelopt."""
    specs, generator, made = MegatronSpecs(hf, hf.model_config), torch.Generator().manual_seed(5), Adapted()

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.3).to(dtype)

    for name, mapping in specs.mappings.items():
        if LINEARS.fullmatch(name) is None:
            continue
        columns = specs.shard(name, 1).shape[1]
        rows = {target: len(tensor) for target, tensor in _pieces(hf, specs, name, mapping).items()}
        modules = {target: target.removesuffix(".weight") for target in rows}
        apart = kind == "canonical" and len(rows) > 1
        shared = random(rank, columns)
        for target, module in modules.items():
            made.a[module] = random(rank, columns) if apart else shared
            made.b[module] = random(rows[target], rank)
            if kind == "dora":
                made.lengths[module] = random(rows[target]).abs() + 0.5
        spelled = spelling(hf)(name)

        def called(part: str, spelled: str = spelled) -> str:
            return f"{spelled.removesuffix('.weight')}.{part}"

        def fused(parts: Mapping[str, Tensor], mapping: MegatronParamMapping = mapping) -> Tensor:
            tensors = {target: parts[target.removesuffix(".weight")] for target in mapping.targets}
            return mapping.split(tensors, hf.model_config, 0, 1).contiguous()

        if apart:
            for role, target in mapping.roles.items():
                made.megatron[called(f"adapter.adapter_{role}.linear_in.weight")] = made.a[modules[target]]
                made.megatron[called(f"adapter.adapter_{role}.linear_out.weight")] = made.b[modules[target]]
            continue
        a, b = (
            ("lora_a_default", "lora_b_default") if kind == "modelopt" else ("adapter.linear_in", "adapter.linear_out")
        )
        made.megatron |= {called(f"{a}.weight"): shared, called(f"{b}.weight"): fused(made.b)}
        if kind == "dora":
            made.megatron[called("adapter.weight_magnitude")] = fused(made.lengths)
    return made


def _pieces(hf: HFModel, specs: MegatronSpecs, name: str, mapping: MegatronParamMapping) -> dict[str, Tensor]:
    whole = torch.empty(specs.shard(name, 1).shape, device="meta")
    return mapping.join([whole], hf.model_config)


def merged_by_peft(
    weights: Mapping[str, Tensor], adapted: Adapted, *, rank: int = RANK, alpha: float = ALPHA
) -> dict[str, Tensor]:
    """The weights of the adapted modules after `merge_and_unload` in fp32, by module.

    Args:
        weights: Hugging Face weights by name.
    """
    from peft import LoraConfig, get_peft_model

    model, keys = nn.ModuleDict(), {module: module.replace(".", "/") for module in adapted.a}
    for module, key in keys.items():
        weight = weights[f"{module}.weight"]
        model[key] = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        model[key].weight = nn.Parameter(weight.float().contiguous())
    dora = bool(adapted.lengths)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(keys.values()), use_dora=dora)
    wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    for module, key in keys.items():
        layer = wrapped.base_model.model[key]
        layer.lora_A["default"].weight.data = adapted.a[module].float()
        layer.lora_B["default"].weight.data = adapted.b[module].float()
        if dora:
            layer.lora_magnitude_vector["default"].weight.data = adapted.lengths[module].float()
    unloaded = wrapped.merge_and_unload()
    return {module: unloaded[key].weight.data for module, key in keys.items()}
