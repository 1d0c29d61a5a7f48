"""Small Hugging Face checkpoints made on the spot, of random weights, cut into files anywhere."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint

HIDDEN, WIDTH, VOCABULARY, EXPERTS = 256, 384, 64, 4
DENSE = {"architectures": ["Qwen3ForCausalLM"], "hidden_size": HIDDEN}
MOE = {"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": HIDDEN}


def dense_model(layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Embedding, head, norms, and layers of seven linears."""
    made = _Maker(dtype)
    tensors = made.around()
    for layer in range(layers):
        tensors |= made.attention(f"model.layers.{layer}")
        tensors |= made.mlp(f"model.layers.{layer}.mlp")
    return tensors


def moe_model(layers: int = 2, *, packed: bool = False) -> dict[str, Tensor]:
    """A `dense_model` with a router and experts, packed or not; gate and up of an expert have the same maximum."""
    made = _Maker(torch.bfloat16)
    tensors = made.around()
    for layer in range(layers):
        mlp = f"model.layers.{layer}.mlp"
        tensors |= made.attention(f"model.layers.{layer}")
        tensors[f"{mlp}.gate.weight"] = made.weight(EXPERTS, HIDDEN)
        experts = [made.mlp("e", width=128) for _ in range(EXPERTS)]
        for expert in experts:
            expert["e.gate_proj.weight"][0, 0] = expert["e.up_proj.weight"][0, 0] = 0.25
        if packed:
            halves = [torch.cat([expert["e.gate_proj.weight"], expert["e.up_proj.weight"]]) for expert in experts]
            tensors[f"{mlp}.experts.gate_up_proj"] = torch.stack(halves)
            tensors[f"{mlp}.experts.down_proj"] = torch.stack([expert["e.down_proj.weight"] for expert in experts])
        else:
            for number, expert in enumerate(experts):
                tensors |= {f"{mlp}.experts.{number}.{name[2:]}": tensor for name, tensor in expert.items()}
    return tensors


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, Tensor],
    *,
    cuts: Sequence[str] = (),
    config: Mapping[str, Any] = DENSE,
) -> Path:
    """Writes tensors into one file, or with an index into several: a new one begins at each tensor named in `cuts`."""
    directory.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if name in cuts:
            parts.append({})
        parts[-1][name] = tensor.contiguous()
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    if not cuts:
        names = ["model.safetensors"]
    for file, part in zip(names, parts, strict=True):
        save_file(part, directory / file, metadata={"format": "pt"})
    if cuts:
        weight_map = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(each.nbytes for each in tensors.values())}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text("{}")
    return directory


def cuts_inside_groups(tensors: Mapping[str, Tensor]) -> list[str]:
    """Places to cut that part q from k and gate from up. (The peer refuses files with parts of two layers' q, k, v.)"""
    wanted = ("0.self_attn.k_proj", "0.mlp.up_proj", "1.self_attn.q_proj", "1.mlp.up_proj", "experts.2.up_proj")
    return [name for name in tensors if any(each in name for each in wanted)]


class _Maker:
    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(5)

    def weight(self, *shape: int) -> Tensor:
        return (torch.randn(*shape, generator=self._generator) * 0.02).to(self._dtype)

    def around(self) -> dict[str, Tensor]:
        tables = {f"{name}.weight": self.weight(VOCABULARY, HIDDEN) for name in ("model.embed_tokens", "lm_head")}
        return {**tables, "model.norm.weight": torch.ones(HIDDEN, dtype=self._dtype)}

    def attention(self, layer: str) -> dict[str, Tensor]:
        rows = {"q_proj": HIDDEN, "k_proj": 128, "v_proj": 128, "o_proj": HIDDEN}
        tensors = {f"{layer}.self_attn.{name}.weight": self.weight(count, HIDDEN) for name, count in rows.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = torch.ones(HIDDEN, dtype=self._dtype)
        return tensors

    def mlp(self, module: str, width: int = WIDTH) -> dict[str, Tensor]:
        shapes = {"gate_proj": (width, HIDDEN), "up_proj": (width, HIDDEN), "down_proj": (HIDDEN, width)}
        return {f"{module}.{name}.weight": self.weight(*shape) for name, shape in shapes.items()}


def change_last_byte(file: Path) -> None:
    """Changes one bit at the end of a file; the size stays."""
    with open(file, "r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)[0]
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last ^ 1]))


def tensors_in(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory of safetensors."""
    with SafetensorsCheckpoint(directory) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.weight_map}


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory, those of the index in the files that it names."""
    index = directory / "model.safetensors.index.json"
    files = {path.name: load_file(path) for path in directory.glob("*.safetensors")}
    found = {name: tensor for held in files.values() for name, tensor in held.items()}
    if index.exists():
        content = json.loads(index.read_text())
        assert content["weight_map"] == {name: file for file, held in files.items() for name in held}
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    return found


def state_of(tensors: Mapping[str, Tensor], form: str) -> QuantState:
    """A calibrated state of all linears of the layers."""
    modules = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
    amax = {f"{module}.weight_quantizer._amax": torch.tensor(0.05 + 0.001 * i) for i, module in enumerate(modules)}
    amax |= {f"{module}.input_quantizer._amax": torch.tensor(3.0 + i) for i, module in enumerate(modules)}
    return QuantState(amax, dict.fromkeys(modules, form))
