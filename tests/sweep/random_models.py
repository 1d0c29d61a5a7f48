"""A random model of a row, and its files in the layouts that transformers writes."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.sweep.architectures import MODULES, PUBLISHED
from tests.sweep.shrunken_configs import tiny_config


def build(model_type: str, architecture: str, *, square: bool = False) -> Any:
    """A tiny random bf16 model of a type.

    Raises:
        Exception: whatever transformers raises on what it cannot build here.
    """
    kind, config = class_and_config(model_type, architecture, square=square)
    torch.manual_seed(7)
    model = kind(config)
    randomize(model)
    return model.to(torch.bfloat16).eval()


def class_and_config(model_type: str, architecture: str, *, square: bool = False) -> tuple[type[Any], Any]:
    """A model's class and a tiny configuration for it: of the type, or the part of it that the class is for."""
    import transformers
    from transformers import CONFIG_MAPPING

    kind = getattr(transformers, architecture)
    config = tiny_config(CONFIG_MAPPING[model_type], square=square)
    if kind.config_class is not None and not isinstance(config, kind.config_class):
        parts = [part for part in vars(config).values() if isinstance(part, kind.config_class)]
        config = parts[0] if parts else config
    if architecture.endswith(("ForCausalLM", "LMHeadModel", "WithLMHead")) and hasattr(config, "is_decoder"):
        config.is_decoder = True
    return kind, config


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Makes every parameter distinct: nothing is zero, one or repeated, so that each row is found by its values."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_floating_point():
                continue
            spread = parameter.float().std() if parameter.numel() > 1 else torch.tensor(0.0)
            if parameter.dim() >= 2 and "A_log" not in name:
                if not torch.isfinite(parameter).all() or not 0.01 < spread < 0.5:
                    nn.init.normal_(parameter, std=0.08)
            elif not torch.isfinite(parameter).all():
                nn.init.normal_(parameter, std=0.08)
            elif spread < 1e-3:
                parameter.add_(0.1 * torch.randn_like(parameter))


def save(model: Any, directory: Path, layout: str) -> None:
    """Saves a model as it is published, or (`MODULES`) under its modules' names.

    Published files have the layout that transformers converts from, and their config.json says nothing of ties where
    the class's default holds. transformers saves experts that it would transpose in its own layout; they are transposed
    here, but not in `SQUARE` files, in which no reader could see that. Nor does it save Dory's layers as published.
    """
    model.save_pretrained(directory, save_original_format=layout != MODULES)
    if layout != MODULES:
        path = directory / "config.json"
        path.write_text(json.dumps(_without_default_ties(json.loads(path.read_text()), model.config)))
    if layout == PUBLISHED and model.config.model_type == "dory":
        path = directory / "model.safetensors"
        save_file(
            {_in_pairs(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"}
        )
    if layout == PUBLISHED and (patterns := _transposed_on_loading(model)):
        path = directory / "model.safetensors"
        tensors = load_file(path)
        for name in tensors:
            if any(pattern.search(name) for pattern in patterns):
                tensors[name] = tensors[name].transpose(1, 2).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})


def _in_pairs(name: str) -> str:
    """A tensor's name in Dory's published files, in which attention and MLP are layers of their own."""
    found = re.fullmatch(r"(.*\.layers)\.(\d+)\.(self_attn|mlp|lambda_1|lambda_2)(.*)", name)
    if found is None:
        return name
    block = {"lambda_1": "attn_alpha", "lambda_2": "mlp_alpha"}.get(found[3], "mixer")
    return f"{found[1]}.{2 * int(found[2]) + (found[3] in ('mlp', 'lambda_2'))}.{block}{found[4]}"


def _transposed_on_loading(model: Any) -> list[re.Pattern[str]]:
    """Patterns of names whose tensors transformers transposes if their shape says so."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return [
        re.compile(pattern.replace("*", r"\d+") + "$")
        for conversion in get_model_conversion_mapping(model, add_legacy=False)
        for operation in getattr(conversion, "operations", ())
        if getattr(operation, "check_dims", False)
        for pattern in conversion.source_patterns
    ]


def _without_default_ties(raw: dict[str, Any], config: Any) -> dict[str, Any]:
    kept = {}
    for name, value in raw.items():
        part = getattr(config, name, None) if isinstance(value, dict) else None
        if name == "tie_word_embeddings" and value == _default_tie(type(config)):
            continue
        kept[name] = value if part is None or isinstance(part, dict) else _without_default_ties(value, part)
    return kept


def _default_tie(kind: type[Any]) -> Any:
    return next((field.default for field in dataclasses.fields(kind) if field.name == "tie_word_embeddings"), None)
