"""Checkpoints to verify: good ones of our own making, in memory, to be broken in one way and written."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.disk.shard_layout import plan_layout
from amaxbridge.export.disk.shard_writer import ShardWriter
from amaxbridge.export.disk.staging import StagedDirectory
from amaxbridge.export.output.config_and_index import index_json
from amaxbridge.export.output.finalizer import Bundle, Finalizer
from amaxbridge.export.schemes import SCHEMES, Groups, Recipe
from amaxbridge.mappings.fused_groups import group_of
from amaxbridge.mappings.tensors import TensorSpec
from tests.support.checkpoints import tensors_in

INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"


@dataclass
class Made:
    """A quantized checkpoint: its tensors and config.json, to be changed; `reference` is what it was made from."""

    reference: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @property
    def quantization(self) -> Any:
        return self.config["quantization_config"]

    @property
    def group(self) -> Any:
        return self.quantization["config_groups"]["group_0"]

    def write(self, target: Path, max_shard_bytes: int = 30_000) -> Path:
        """Several shards with an index, by our own writer."""
        layout = plan_layout({name: TensorSpec.of(each) for name, each in self.tensors.items()}, max_shard_bytes)
        with StagedDirectory(target) as staged:
            staged.open(layout)
            writer = ShardWriter(staged.path, layout)
            for name, tensor in self.tensors.items():
                writer.write(name, tensor)
            writer.close()
            staged.write_file("config.json", json.dumps(self.config).encode())
            staged.write_file(INDEX, index_json(layout) or b"")
            staged.write_file(TOKENIZER, b"{}")
            staged.commit()
        return target


def make(hf: Path, scheme: str, *, cache: bool = False) -> Made:
    """What an export writes of a Hugging Face directory, calibrated where the scheme needs it."""
    tensors, config = tensors_in(hf), json.loads((hf / "config.json").read_text())
    recipe = recipe_of(scheme)
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    state = None
    if SCHEMES[scheme].needs_input_amax or cache:
        state = state_of(tensors, scheme, layers=config["num_hidden_layers"] if cache else 0)
    finalizer = Finalizer(specs, recipe, state)
    written = dict(finalizer.finalize(Bundle.of(tensors)))
    return Made(hf, written, {**config, "quantization_config": finalizer.quantization_config})


def recipe_of(scheme: str) -> Recipe:
    """The recipe of a scheme, with groups of 32 because the tiny models are narrow."""
    return Groups.of(SCHEMES[scheme].with_group_size(32) or SCHEMES[scheme])


def state_of(tensors: dict[str, Tensor], scheme: str, layers: int = 0) -> QuantState:
    """Amax of all weights, of the inputs that need one, and of the caches of some layers."""
    modules = [name.removesuffix(".weight") for name in tensors if "_proj" in name]
    amax = {f"{name}.weight_quantizer._amax": tensors[f"{name}.weight"].float().abs().max() for name in modules}
    for number, name in enumerate(modules):
        amax[f"{name}.input_quantizer._amax"] = torch.tensor(4.0 + number % 7)
    for layer in range(layers):
        for letter in "kv":
            amax[f"model.layers.{layer}.self_attn.{letter}_bmm_quantizer._amax"] = torch.tensor(3.0 + layer)
    return QuantState(amax, dict.fromkeys(modules, SCHEMES[scheme].format))


def saved_amax(made: Made) -> Iterator[tuple[str, Tensor]]:
    """The state that `make` calibrated with, for a file: names and amax."""
    yield from state_of(tensors_in(made.reference), "nvfp4").amax.items()


def fused(module: str, suffix: str) -> list[str]:
    """A tensor of each member of a module's fused group."""
    return [f"{member}.{suffix}" for member in group_of(module).members]
