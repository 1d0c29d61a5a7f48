"""Compressed-tensors checkpoints in plain torch: one linear layer, or all of a model's.

`load_linear` makes one layer of a directory, whole or one rank's part, merged if it is named as engines name it:

    qkv = load_linear(directory, "model.layers.0.self_attn.qkv_proj", tp_rank=1, tp_size=2)

`load_model_` fills a model whose parameters are named as in the checkpoint, as those of transformers' dense families
are, and puts layers of the runtime in the place of its quantized ones. Nothing is left out in silence: a tensor that
nothing takes, and a parameter that nothing fills, are errors by name.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from amaxbridge.export.architectures.engines import members_of
from amaxbridge.export.disk.input_paths import given_path
from amaxbridge.export.disk.io_errors import changed_meanwhile
from amaxbridge.export.disk.safetensors_directory import SafetensorsCheckpoint
from amaxbridge.export.disk.strict_json import read_json_object
from amaxbridge.export.output.config_and_index import CONFIG_FILE
from amaxbridge.export.runtime.compressed_tensors_config import CompressedTensorsConfig
from amaxbridge.export.runtime.linear_method import CompressedTensorsLinearMethod
from amaxbridge.mappings.errors import AmaxbridgeError, CheckpointError, MappingError, UsageError, listing
from amaxbridge.mappings.names import module_of
from amaxbridge.mappings.tensors import TensorSpec, shard_of

_CACHE_SCALES = (".k_scale", ".v_scale")


class CompressedLinear(nn.Module):
    """A linear layer of a checkpoint, in the place of `nn.Linear`.

    Args:
        method: how it loads and computes.
        in_features: on all ranks.
        members: outputs on all ranks, of each merged module.
        bias: `[out]` on this rank.
        dtype: of the inputs.
        tp_rank: of this rank.
        tp_size: how many ranks the layer is cut into.
        tp_dim: what is cut, 0 for outputs, 1 for inputs.
    """

    def __init__(
        self,
        method: CompressedTensorsLinearMethod,
        in_features: int,
        members: list[int],
        *,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        tp_rank: int = 0,
        tp_size: int = 1,
        tp_dim: int = 0,
    ) -> None:
        super().__init__()
        cuts = (tp_size, 1) if tp_dim == 0 else (1, tp_size)
        uneven = [size for size in members if size % cuts[0]] + [in_features] * bool(in_features % cuts[1])
        if uneven:
            raise UsageError(f"{method.prefix}: sizes {uneven} do not divide into {tp_size} ranks")
        if tp_rank not in range(tp_size):
            raise UsageError(f"{method.prefix}: there is no rank {tp_rank} among {tp_size}")
        self.method = method
        rows = [size // cuts[0] for size in members]
        self.in_features, self.out_features = in_features // cuts[1], sum(rows)
        sizes = (self.in_features, rows, in_features, sum(members))
        method.create_weights(self, *sizes, dtype, tp_rank=tp_rank, tp_size=tp_size)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves to a device, as any module; but dtypes are the format's, whatever the model is cast to."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor is self.bias or moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def dequantized(self) -> Tensor:
        """The weight `[out, in]` of this rank in bf16, as the layer computes with it."""
        return self.method.scheme.weight(self)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.method.signature}"


def load_linear(
    directory: Path | str,
    module_name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tp_rank: int = 0,
    tp_size: int = 1,
    tp_dim: int = 0,
) -> nn.Module:
    """One linear layer of a checkpoint, on the CPU; move it with `.to` as any module.

    Args:
        directory: of the checkpoint.
        module_name: full name of a module, or of a fused layer, whose modules are then merged.
        dtype: of the inputs.
        tp_rank: the rank whose part it is.
        tp_size: how many ranks the layer is cut into.
        tp_dim: what is cut, 0 for outputs, 1 for inputs; of those that cut inputs, rank 0 has the bias.

    Returns:
        A `CompressedLinear`, or an `nn.Linear` for a module that is not quantized.

    Raises:
        CheckpointError: a tensor is missing, does not fit, or is one that its format does not know; or a file changed.
        MappingError: the format does not divide the layer into so many ranks.
    """
    with _Reader(given_path(directory)) as reader:
        return reader.linear(module_name, dtype, (tp_rank, tp_size, tp_dim))


def load_model_(model: nn.Module, directory: Path | str) -> None:
    """Fills a model from a checkpoint, in place; its quantized linear layers become `CompressedLinear`.

    Args:
        model: built, with any values, e.g. by `AutoModelForCausalLM.from_config`; parameters may be on the meta device.
        directory: of the checkpoint.

    Raises:
        CheckpointError: tensors that the model has no place for, or parameters that the checkpoint has no tensor for.
    """
    with _Reader(given_path(directory)) as reader:
        tied = _tied(model)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name in reader.modules and reader.method(name, module) is not None:
                layer = reader.linear(name, module.weight.dtype, (0, 1, 0))
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, layer.train(module.training))
        missing = []
        for name, parameter in _unquantized(model).items():
            if name in reader.checkpoint.weight_map:
                _assign(model, name, reader.read(name), parameter)
            elif name not in tied:
                missing.append(name)
        for name, source in tied.items():
            _set(model, name, model.get_parameter(source))
        missing += [name for name, buffer in model.named_buffers() if buffer.is_meta]  # not saved: it must be computed
        reader.check_all_read(missing)


class _Reader:
    """A directory: its tensors by module, its config, and which tensors were read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.checkpoint = SafetensorsCheckpoint(directory)
        self.modules: dict[str, list[str]] = defaultdict(list)
        for name in self.checkpoint.tensors:
            self.modules[module_of(name)].append(name)
        self._read: set[str] = set()
        self._quantization = quantization = _quantization_config(directory)
        self._config = None if quantization is None else CompressedTensorsConfig.from_config(quantization)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, ValueError) and not isinstance(error, AmaxbridgeError):  # of a format, or of a kernel
                raise MappingError(f"{self.directory}: {error}") from error
            if error is None:
                self.checkpoint.check_unchanged()
                if _quantization_config(self.directory) != self._quantization:
                    raise changed_meanwhile(self.directory / CONFIG_FILE)
        finally:
            self.checkpoint.close()

    def read(self, name: str) -> Tensor:
        self._read.add(name)
        return self.checkpoint.read(name)

    def method(self, name: str, layer: nn.Module) -> CompressedTensorsLinearMethod | None:
        return None if self._config is None else self._config.get_quant_method(layer, name)

    def linear(self, name: str, dtype: torch.dtype, tp: tuple[int, int, int]) -> nn.Module:
        rank, size, dim = tp
        members = (name,) if name in self.modules else members_of(name)
        absent = [member for member in members if member not in self.modules]
        if absent:
            raise CheckpointError(f"{self.directory} has no tensors of {', '.join(absent)}")
        bias = self._bias(members, tp)
        method = self.method(name, nn.Linear(1, 1, device="meta"))
        if method is None:
            weights = [shard_of(self.read(f"{member}.weight"), dim, rank, size) for member in members]
            return _plain(torch.cat(weights).to(dtype), bias if bias is None else bias.to(dtype))
        shapes = [self._shape(member) for member in members]
        layer = CompressedLinear(
            method, shapes[0][1], [rows for rows, _ in shapes],
            bias=bias if bias is None else bias.to(dtype), dtype=dtype, tp_rank=rank, tp_size=size, tp_dim=dim,
        )  # fmt: skip
        for number, member in enumerate(members):
            self._load(layer, member, number)
        method.process_weights_after_loading(layer)
        return layer

    def check_all_read(self, missing: list[str]) -> None:
        """Ends a load of a whole model.

        Raises:
            CheckpointError: `missing` are parameters without a tensor, or tensors were not read.
        """
        unread = [name for name in self.checkpoint.tensors if name not in self._read]
        scales = [name for name in unread if name.endswith(_CACHE_SCALES)]
        unread = [name for name in unread if name not in scales]
        if missing or unread:
            rows = [f"{name}: in the model only" for name in missing]
            rows += [f"{name}: in the checkpoint only" for name in unread]
            raise CheckpointError(f"{self.directory} is not a checkpoint of this model:{listing(rows)}")
        if scales:
            warnings.warn(f"{len(scales)} scales of a quantized key-value cache: this runtime has none", stacklevel=3)

    def _load(self, layer: CompressedLinear, member: str, number: int) -> None:
        for name in self.modules[member]:
            local = name.removeprefix(f"{member}.")
            if local == "bias":
                continue
            parameter = layer._parameters.get(local)
            if parameter is None:
                raise CheckpointError(
                    f"{name} is no tensor of {layer.method.signature}; the layer has {', '.join(layer._parameters)}. "
                    "An engine would refuse it, or compute something else"
                )
            try:
                parameter.weight_loader(parameter, self.read(name), number)  # type: ignore[attr-defined]
            except CheckpointError as error:
                raise CheckpointError(f"{member}: {error}") from error

    def _shape(self, member: str) -> tuple[int, int]:
        """Outputs and inputs of a quantized module."""
        specs = {name.removeprefix(f"{member}."): self.checkpoint.tensors[name].spec for name in self.modules[member]}
        if "weight_shape" in specs:
            rows, columns = self.checkpoint.read(f"{member}.weight_shape").tolist()
            return rows, columns
        found = specs.get("weight", specs.get("weight_packed"))
        if found is None or len(found.shape) != 2:
            raise CheckpointError(
                f"{member} has no weight of two dims: {', '.join(f'{n} {s}' for n, s in specs.items())}"
            )
        return found.shape[0], found.shape[1] * (1 if "weight" in specs else 2)

    def _bias(self, members: tuple[str, ...], tp: tuple[int, int, int]) -> Tensor | None:
        names = [f"{member}.bias" for member in members]
        present = [name for name in names if name in self.checkpoint.tensors]
        if not present:
            return None
        rank, size, dim = tp
        if present != names:
            missing = ", ".join(name for name in names if name not in present)
            raise CheckpointError(
                f"{missing} is missing, but {', '.join(present)} is there: fused layers need all or none"
            )
        biases = [self.read(name) for name in names]
        if dim == 1:
            return torch.cat(biases) if rank == 0 else None
        return torch.cat([shard_of(bias, 0, rank, size) for bias in biases])


def _quantization_config(directory: Path) -> Mapping[str, Any] | None:
    config = read_json_object(directory / CONFIG_FILE)
    if config is None:
        raise CheckpointError(f"{directory} has no {CONFIG_FILE}: give the directory of a checkpoint")
    stated: Mapping[str, Any] | None = config.get("quantization_config")
    return stated


def _plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _tied(model: nn.Module) -> dict[str, str]:
    """Parameters that are another one, and which."""
    first: dict[int, str] = {}
    names = model.named_parameters(remove_duplicate=False)
    return {name: source for name, parameter in names if (source := first.setdefault(id(parameter), name)) != name}


def _unquantized(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers that no layer of the runtime holds."""
    done = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, CompressedLinear))
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if not name.startswith(done)}


def _assign(model: nn.Module, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise CheckpointError(f"{name}: the checkpoint has {TensorSpec.of(tensor)}, the model {TensorSpec.of(like)}")
    value = tensor.to(like.dtype)
    _set(model, name, nn.Parameter(value, requires_grad=False) if isinstance(like, nn.Parameter) else value)


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, value)
