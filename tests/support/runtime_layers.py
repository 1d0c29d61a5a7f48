"""Layers of the runtime filled with what the schemes write, for its tests; on a GPU too, so without a framework."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from amaxbridge.export.amax.fused_group_amax import GroupAmax
from amaxbridge.export.output.config_and_index import quantization_config
from amaxbridge.export.runtime import CompressedLinear, CompressedTensorsConfig, CompressedTensorsLinearMethod
from amaxbridge.export.schemes import SCHEMES, Scheme
from amaxbridge.export.schemes.scheme import quantize_tensors

GROUP = GroupAmax(torch.tensor(0.11), torch.tensor(3.0))


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03).bfloat16()


def random_inputs(columns: int, tokens: int = 5, seed: int = 9) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def written(scheme: Scheme, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors that a scheme writes for a fused group: module → name → tensor."""
    amax = GROUP if scheme.needs_input_amax else None
    found: dict[str, dict[str, Tensor]] = {module: {} for module in weights}
    for name, tensor in quantize_tensors(scheme, weights, amax):
        module, _, local = name.rpartition(".")
        found[module][local] = tensor
    return found


def method_of(scheme: Scheme, prefix: str = "m") -> CompressedTensorsLinearMethod:
    config = CompressedTensorsConfig.from_config(quantization_config({"m": scheme}, []))
    method = config.get_quant_method(nn.Linear(1, 1), prefix)
    assert method is not None
    return method


def load(layer: nn.Module, tensors: Mapping[str, Tensor], shard: int | str | None = None) -> None:
    for name, tensor in tensors.items():
        parameter = layer.get_parameter(name)
        parameter.weight_loader(parameter, tensor, shard)


def layer_of(
    method: CompressedTensorsLinearMethod, parts: Sequence[Mapping[str, Tensor]], sizes: Sequence[tuple[int, int]],
    *, bias: Tensor | None = None, tp_rank: int = 0, tp_size: int = 1, tp_dim: int = 0,
) -> CompressedLinear:  # fmt: skip
    """A layer with the tensors of its modules, `[out, in]` each, on one rank."""
    rows = [rows for rows, _ in sizes]
    tp = {"tp_rank": tp_rank, "tp_size": tp_size, "tp_dim": tp_dim}
    layer = CompressedLinear(method, sizes[0][1], rows, bias=bias, **tp)
    for number, tensors in enumerate(parts):
        load(layer, tensors, number if len(parts) > 1 else None)
    method.process_weights_after_loading(layer)
    return layer


def quantized_layer(name: str, weight: Tensor, **options: Tensor) -> tuple[CompressedLinear, dict[str, Tensor]]:
    """A layer of one module under a scheme, and the tensors it came from."""
    tensors = written(SCHEMES[name], {"m": weight})["m"]
    return layer_of(method_of(SCHEMES[name]), [tensors], [tuple(weight.shape)], **options), tensors
