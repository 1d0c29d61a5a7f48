"""Judges a quantized directory by transformers: its keys, its logits, and its matrices once it is loaded."""

import inspect
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.sweep.true_matrices import Matrix, matrices

# Relative error of the logits. A random model amplifies rounding, up to 0.7; other weights give 1.2 and more.
LOGIT_BOUND = 1.0
RUNNING = {"does not run", "logits not finite", "logits"}


def _decompress(model: Any) -> None:
    """Decompresses what the first forward pass has not."""
    from compressed_tensors.compressors import decompress_module
    from compressed_tensors.quantization import QuantizationStatus

    for module in model.modules():
        if getattr(module, "quantization_status", None) == QuantizationStatus.COMPRESSED:
            decompress_module(module)


def inputs_for(model: Any) -> Iterator[dict[str, Any]]:
    """Inputs that a model may take, the likeliest first: tokens, then tokens beside sound or images."""
    known = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(10, 250, (1, 16), generator=generator)
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    decoder = {"decoder_input_ids": torch.randint(10, 250, (1, 12), generator=generator)}
    text = {name: value for name, value in tokens.items() if name in known}
    both = {name: value for name, value in (tokens | decoder).items() if name in known}
    yield both
    yield text
    yield {"input_ids": ids}
    mel = _find(model.config, ("num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", "input_dim")) or 80
    frames = 2 * (_find(model.config, ("max_source_positions",)) or 128)
    for shape in ((1, mel, frames), (1, 256, mel)):
        for name in ("input_features", "input_values"):
            if name in known:
                yield {
                    **{key: value for key, value in decoder.items() if key in known},
                    name: torch.randn(shape, generator=generator).bfloat16(),
                }
    if "input_values" in known:
        yield {
            **{key: value for key, value in decoder.items() if key in known},
            "input_values": torch.randn((1, 16000), generator=generator).bfloat16(),
        }
    if "pixel_values" in known:
        size = _find(model.config, ("image_size",)) or 32
        size = size if isinstance(size, int) else size[0]
        pixels = {"pixel_values": torch.randn((1, 3, size, size), generator=generator).bfloat16()}
        yield {**both, **pixels}
        yield {**{key: value for key, value in decoder.items() if key in known}, **pixels}
    if "flattened_patches" in known:
        yield {
            "flattened_patches": torch.rand((1, 16, 770), generator=generator).bfloat16(),
            **{k: v for k, v in decoder.items() if k in known},
        }
    for depth in (_find(model.config, ("num_codebooks",)) or 4, (_find(model.config, ("num_codebooks",)) or 4) + 1):
        yield {"input_ids": torch.randint(2, 60, (1, 8, depth), generator=generator)}
        yield {"input_ids": torch.randint(2, 60, (depth, 8), generator=generator)}


def _find(config: Any, names: Sequence[str]) -> Any:
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "to_dict"))]
    for part in parts:
        for name in names:
            if isinstance(getattr(part, name, None), int | list | tuple):
                return getattr(part, name)
    return None


@torch.no_grad()
def logits_of(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The logits of some inputs, in fp32."""
    torch.manual_seed(3)
    outcome = model(**inputs)
    logits = getattr(outcome, "logits", None)
    if logits is None:
        logits = next(value for value in outcome.values() if isinstance(value, Tensor) and value.is_floating_point())
    return logits.float()


def first_logits(model: Any) -> tuple[dict[str, Any], Tensor] | str:
    """The first inputs that the model takes and their logits, or why there are none."""
    problem = "no inputs known"
    for inputs in inputs_for(model):
        try:
            logits = logits_of(model, inputs)
        except Exception as error:
            if problem == "no inputs known":
                problem = f"{type(error).__name__}: {str(error)[:120]}"
            continue
        if bool(torch.isfinite(logits).all()):
            return inputs, logits
        problem = "the original's own logits are not finite"
    return problem


def judge_loading(
    kind: Any,
    directory: Path,
    truth: Sequence[Matrix],
    quantized: Container[tuple[str, str, int | None]],
    reference: tuple[dict[str, Any], Tensor] | str,
    bound: float,
    experts: int,
    vocabulary: int,
) -> list[tuple[str, str]]:
    """What transformers does not do right with a directory: kind and example of each fault.

    Args:
        truth: the original's matrices; `quantized` has module, part and expert of those that may differ by `bound`.
        reference: inputs and the original's logits; or why there are none.
    """
    problems: list[tuple[str, str]] = []
    try:
        model, info = kind.from_pretrained(directory, output_loading_info=True, dtype="auto")
    except Exception as error:
        return [("does not load", f"{type(error).__name__}: {str(error)[:200]}")]
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "conversion_errors"):
        problems.extend((key.replace("_", " "), str(found)) for found in sorted(map(str, info.get(key) or ())))
    model.eval()
    if not isinstance(reference, str):
        problems.extend(_judge_logits(model, *reference))
    _decompress(model)
    loaded = {(each.module, each.part, each.expert): each.weight for each in matrices(model, experts, vocabulary)}
    for matrix in truth:
        key = (matrix.module, matrix.part, matrix.expert)
        single = (
            f"{matrix.module}.{matrix.expert}.{matrix.part}_proj",
            "weight",
            None,
        )  # experts taken apart, as Llama 4's
        weight, expected = loaded.get(key, loaded.get(single)), matrix.weight.float()
        if weight is None or weight.shape != expected.shape:
            problems.append((f"{matrix.kind} not there after loading", matrix.name))
            continue
        error = float((weight.float() - expected).norm() / expected.norm().clamp(min=1e-12))
        if not error <= (bound if key in quantized else 0.0):
            problems.append((f"{matrix.kind} wrong after loading", f"{matrix.name}: error {error:.2f}"))
    return problems


def _judge_logits(model: Any, inputs: Mapping[str, Any], expected: Tensor) -> list[tuple[str, str]]:
    try:
        logits = logits_of(model, inputs)
    except Exception as error:
        return [("does not run", f"{type(error).__name__}: {str(error)[:200]}")]
    if not bool(torch.isfinite(logits).all()):
        return [("logits not finite", "")]
    off = float((logits - expected).norm() / expected.norm())
    return [] if off < LOGIT_BOUND else [("logits", f"error {off:.2f}")]
