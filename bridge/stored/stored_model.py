"""The Megatron tensors and quantizers of a distributed checkpoint, under the global names that mappings use.

Megatron stores the same parameter in several forms, depending on its version and on the use of ModelOpt:

    decoder.layers.self_attention.linear_qkv.weight      [layers, …]            all layers in one tensor
    decoder.layers.3.self_attention.linear_qkv.weight    […]                    one layer
    …mlp.experts.experts.linear_fc1.weight               [experts, …]           all experts of a layer, or of all layers
    …mlp.experts.experts.7.linear_fc1.weight             […]                    one expert
    …mlp.linear_fc1.weight                               [2 · ffn, hidden]      gate rows, then up rows
    …mlp.linear_fc1.weight_w, …weight_v                  [ffn, hidden]          gate, up
    …mlp.experts.linear_fc1.weight7_w, …weight7_v        [ffn, hidden]          gate, up of one expert
    …mixer.in_proj.weight.z, .x, .B, .C, .dt             […, hidden]            sections of a Mamba mixer
    …self_attention.in_proj.weight.query, .key, …        […, hidden]            sections of a gated delta net
    …mlp.linear_fc1.weight_quantizer._amax               [2 · ffn, blocks]      see `_halves_alternate`
    …linear_fc1.adapter.adapter_up.linear_out.weight     [ffn, rank]            see `_halves_apart`

A stored tensor is global: one rank would hold it so without parallelism. How ranks sharded it makes no difference.

Quantizer configurations are in the `_extra_state` of their modules (`module_state`). Where Transformer Engine
runs the experts of a rank as one grouped linear, each expert has the state of all of it: `input_quantizer`, which the
experts share, and `weight_quantizer.0`, `.1`, … of the experts of that rank. ModelOpt before 0.47 has one
`weight_quantizer`, which they share, too.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from amaxbridge.bridge.live.compressed_weights import (
    Packing,
    amax_of_scales,
    block_of,
    fault_of_scales,
    one_scale_of_each_row,
    packing_of,
    quantizer_of,
    unpacked,
    weight_of,
)
from amaxbridge.bridge.live.model_walk import ABSENT, Parameter, Quantizer
from amaxbridge.bridge.stored.module_state import Settings, quantizer_settings
from amaxbridge.bridge.stored.stored_source import Region, StoredSource
from amaxbridge.mappings.adapters import is_adapter
from amaxbridge.mappings.canonical import canonical
from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.names import is_quantizer_state, module_of, natural_key
from amaxbridge.mappings.tensors import TensorSpec

FINAL_NORM_OF_HYBRID = "decoder.final_norm.weight"
"""Only HybridModel's checkpoints have it; GPTModel's have `final_layernorm`."""
_NOT_THE_MODEL = re.compile(
    r"(chained_\d+\.)*optimizer\.|rng_state|rerun_state_machine|opt_param_scheduler|ema\."
)  # chained: one optimizer for experts, one for the rest (ChainedOptimizer.sharded_state_dict of megatron-core)
_ALL_LAYERS = re.compile(r"\blayers\.(?!\d)")
_ALL_EXPERTS = re.compile(r"\.experts\.experts\.(?!\d)")
_ONE_EXPERT = re.compile(r"\.experts\.experts\.(\d+)\.")
_GROUPED = re.compile(r"weight_quantizer\.(\d+)")
_PIECE = re.compile(
    r"(.*\.linear_fc1\.(?:adapter\.linear_out\.)?(?:weight|bias)\d*)_([wv])"  # gate, up: MLP.sharded_state_dict, FSDP
    r"|(.*\.mixer\.(?:in_proj(?:\.adapter\.linear_out)?|conv1d)\.(?:weight|bias))\.(z|x|B|C|dt)"  # MambaMixer's
    r"|(.*\.self_attention\.(?:in_proj|conv1d)\.weight)\.(query|key|value|z|beta|alpha)"  # GatedDeltaNet's
)
_PIECES = ("", "w", "v", "query", "key", "value", "z", "x", "B", "C", "dt", "beta", "alpha")  # in the mappings' order
_SECTIONED = re.compile(
    r".*\.(?:mixer|self_attention)\.in_proj\."
    r"(?:weight_quantizer\._amax(?:_pre|_post)?|adapter\.weight_magnitude|lora_b_\w+\.weight)"
    r"|.*\.self_attention\.in_proj\.adapter\.linear_out\.weight"
)  # rows that follow a weight of sections, but are saved in the order of ranks
_STATE = re.compile(r"(.+)\._extra_state/shard_([\d.]+)_[\d.]+")
_EXPERT = re.compile(r"(.*\.experts\.linear_fc[12])\.weight(\d+)")
_WEIGHT_AMAX = re.compile(r"(.*\.weight)_quantizer(?:\.(\d+))?\._(?:amax(?:_pre|_post)?|scale)")
_SIDE_OF_EXPERT = re.compile(r"(.*\.experts\.linear_fc[12]\.adapter\.linear_)(in|out)\.weight(\d+)")
_LENGTHS = re.compile(r"(.*\.linear_fc1\.adapter\.)weight_magnitude(\d*)")
_MODELOPT_B = re.compile(r"(.*\.linear_fc1\.)lora_b_\w+(\.weight\d*)")
_HALF_OF_FC1 = re.compile(r".*\.linear_fc1\.adapter\.adapter_(?:gate|up)\.linear_out\.weight")
_THE_SAME_FOR_ALL = ("_disabled", "_num_bits")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A Megatron tensor in a checkpoint.

    Args:
        name: canonical global name.
        spec: global shape and dtype.
        regions: its regions in the checkpoint, joined along the first dim.
        alternating: the number of ranks whose gate and up rows alternate, `[gate0 up0 gate1 up1 …]`; 1 for none.
        apart: the number of ranks whose first halves all precede their second halves; 1 for none.
        of_blocks: True for the amax of blocks along rows, stored as `[rows · blocks of a rank, ranks]`.
    """

    name: str
    spec: TensorSpec
    regions: tuple[Region, ...]
    alternating: int = 1
    apart: int = 1
    of_blocks: bool = False

    def join(self, parts: list[Tensor]) -> Tensor:
        """The tensor, from the tensors of its regions."""
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.of_blocks:
            tensor = tensor.unflatten(0, (self.spec.shape[0], -1)).transpose(1, 2).flatten(1)
        if self.alternating > 1:
            tensor = tensor.unflatten(0, (self.alternating, 2, -1)).transpose(0, 1).flatten(0, 2)
        if self.apart > 1:
            tensor = tensor.unflatten(0, (2, self.apart, -1)).transpose(0, 1).flatten(0, 2)
        return tensor


def is_of_model(key: str) -> bool:
    """True if a tensor of a checkpoint belongs to the model, not to the training around it."""
    return _NOT_THE_MODEL.match(key) is None


class StoredModel(Mapping[str, Tensor]):
    """The model in a checkpoint: `parameters` and `quantizers` as a live model would have them.

    As a mapping: every whole tensor by canonical global name, read on access.

    Args:
        checkpoint: open for reading.
        spelling: global Megatron name → the mappings' name; see `ModelFamily.spelling`.
    """

    def __init__(self, checkpoint: StoredSource, spelling: Callable[[str], str] = canonical) -> None:
        self.checkpoint = checkpoint
        self._spelling = spelling
        self.is_plain: Callable[[str], bool] = lambda quantizer: False

    def __getitem__(self, name: str) -> Tensor:
        quantizer = quantizer_of(name)
        if (packing := self.packings.get(quantizer)) is None or name.endswith(("._scale", "._double_scale")):
            return self._read(name)
        scale, double_scale = self._scales(quantizer)
        if name.endswith("._amax"):
            return amax_of_scales(packing, scale, double_scale).reshape(self.tensors[name].spec.shape)
        return unpacked(packing, self._read(name), scale, double_scale, restores=not self.is_plain(quantizer))

    def _read(self, name: str) -> Tensor:
        stored = self.tensors[name]
        return stored.join(self.checkpoint.read(stored.regions))

    def _scales(self, quantizer: str) -> tuple[Tensor, Tensor | None]:
        """The scales of a weight that `mtq.compress` packed."""
        scale, double_scale = self._read(f"{quantizer}._scale"), f"{quantizer}._double_scale"
        if self.packings[quantizer] is Packing.FP8 and scale.ndim == 2:
            scale = one_scale_of_each_row(quantizer, scale)
        return scale, self._read(double_scale) if double_scale in self.tensors else None

    @cached_property
    def packings(self) -> dict[str, Packing]:
        """The quantizers whose weights `mtq.compress` packed, and how."""
        return {name: packing for name, packing in self._packed.items() if self._fault_of(name, packing) is None}

    @cached_property
    def packing_faults(self) -> list[str]:
        """One line for each packed weight that cannot be unpacked."""
        return [fault for name, packing in self._packed.items() if (fault := self._fault_of(name, packing)) is not None]

    @cached_property
    def _packed(self) -> dict[str, Packing]:
        found = dict[str, Packing]()
        for name, setting in self._one_setting_each.items():
            held = [each for each in ("_scale", "_double_scale") if f"{name}.{each}" in self.tensors]
            attributes = {**setting, **dict.fromkeys(held, torch.empty(0))}
            packing = packing_of(Quantizer(name, None, None, (), attributes))
            if packing is not None and weight_of(name) in self.tensors:
                found[name] = packing
        return found

    def _fault_of(self, quantizer: str, packing: Packing) -> str | None:
        weight, scale = weight_of(quantizer), self.tensors[f"{quantizer}._scale"].spec
        if packing is Packing.FP8 and len(scale.shape) == 2:
            scale = TensorSpec((scale.shape[0], 1), scale.dtype)  # ranks' copies, side by side
        block = block_of(self._one_setting_each[quantizer])
        return fault_of_scales(weight, packing, self.tensors[weight].spec, scale, block)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor of the model with its place, quantizer buffers included."""
        regions: dict[str, dict[str, Region]] = {}
        for key, spec in self.checkpoint.tensors.items():
            if is_of_model(key):
                for name, region in _one_by_one(key, spec):
                    name = name.replace(".to_wrap.", ".")  # of a linear beside its adapter
                    piece = _PIECE.fullmatch(name)
                    name, part = filter(None, piece.groups()) if piece else (name, "")
                    regions.setdefault(self._spelling(name), {})[part] = region
        _share_sides(regions)
        return {name: self._stored(name, parts, regions) for name, parts in regions.items()}

    def _stored(
        self, name: str, parts: Mapping[str, Region], regions: Mapping[str, Mapping[str, Region]]
    ) -> StoredTensor:
        spec, alternating = self._spec(parts), self._halves_alternate(name, regions)
        if is_adapter(name):
            return StoredTensor(name, spec, _in_order(parts), alternating, self._halves_apart(name, parts))
        found = _WEIGHT_AMAX.fullmatch(name)
        weight = regions.get(found[1] + (found[2] or "")) if found else None
        if weight is None or len(spec.shape) != 2:
            return StoredTensor(name, spec, _in_order(parts), alternating)
        rows, held = self._spec(weight).shape[0], spec.shape[0]
        if held in (1, rows) or held % rows:
            return StoredTensor(name, spec, _in_order(parts), alternating)
        spec = TensorSpec((rows, held // rows * spec.shape[1]), spec.dtype)
        return StoredTensor(name, spec, _in_order(parts), alternating, of_blocks=True)

    def parameters(self) -> Iterator[Parameter]:
        """All parameters and buffers except quantizer buffers, as tensors without data."""
        for name, stored in self.tensors.items():
            if not is_quantizer_state(name):
                yield Parameter(name, self._plain_spec(name, stored.spec).meta())

    def _plain_spec(self, name: str, spec: TensorSpec) -> TensorSpec:
        """Shape and dtype of a tensor, those of a packed weight as it is read."""
        packing = self.packings.get(quantizer_of(name))
        if packing is None:
            return spec
        columns = spec.shape[1] * (2 if packing.has_two_in_a_byte else 1)
        return TensorSpec((spec.shape[0], columns), torch.bfloat16)

    def quantizers(self) -> list[Quantizer]:
        """As `all_quantizers`: those that are enabled."""
        return [each for each in self.all_quantizers() if each.module.is_enabled]

    def all_quantizers(self) -> list[Quantizer]:
        """All quantizers. State of one number is read; larger state is given by its shape and its maximum.

        A buffer that a quantizer had, but that ModelOpt did not save, has the value `ABSENT`.

        Raises:
            CheckpointError: the checkpoint has state of a quantizer without its configuration, or two configurations.
        """
        settings, experts = self._one_setting_each, self._experts()
        buffers: dict[str, dict[str, Tensor]] = {}
        for name, value in self._state():
            quantizer, _, buffer = name.rpartition(".")
            buffers.setdefault(quantizer, {})[buffer] = value
        orphans = sorted(buffers.keys() - settings.keys(), key=natural_key)
        if orphans:
            raise CheckpointError(
                f"{self.checkpoint.directory} has amax without a quantizer configuration:{listing(orphans)}\n"
                "Load it into a model with the ModelOpt that saved it, and export from there (save_hf_pretrained)"
            )
        return [
            Quantizer(
                name,
                SimpleNamespace(
                    **_attributes(setting), **self._effective(name, held), is_enabled=not setting["_disabled"]
                ),
                rows=None,
                experts=experts.get(module_of(name), ()),
                attributes={**dict.fromkeys(_saved_buffers(setting), ABSENT), **setting, **held},
            )
            for name, setting in settings.items()
            for held in [buffers.get(name, {})]
        ]

    def _effective(self, quantizer: str, held: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The buffers that act: those of a packed weight are the amax of its scales."""
        if quantizer not in self.packings:
            return held
        amax = self[f"{quantizer}._amax"]
        whole = {} if amax.numel() == 1 else {"_global_amax": amax.max()}
        return {"_amax": amax if amax.numel() == 1 else TensorSpec.of(amax).meta(), **whole}

    @cached_property
    def _one_setting_each(self) -> dict[str, Mapping[str, Any]]:
        """Quantizer → its configuration. One that experts share is in the state of each of them."""
        settings: dict[str, Mapping[str, Any]] = {}
        differ: set[str] = set()
        for name, setting in self._settings():
            first = settings.setdefault(name, setting)
            if any(first.get(key) != setting.get(key) for key in _THE_SAME_FOR_ALL):
                differ.add(name)
        if differ:
            shared = sorted(differ, key=natural_key)
            raise CheckpointError(
                f"{self.checkpoint.directory}: experts disagree about the settings of quantizers that they share:"
                f"{listing(shared)}\n"
                "Give each expert its own quantizer, or the same settings to all, and save again"
            )
        return settings

    def _spec(self, parts: Mapping[str, Region]) -> TensorSpec:
        specs = [self.checkpoint.spec(region) for region in parts.values()]
        first = specs[0]
        if len(specs) == 1:
            return first
        return TensorSpec((sum(spec.shape[0] for spec in specs), *first.shape[1:]), first.dtype)

    def _halves_alternate(self, name: str, regions: Mapping[str, Mapping[str, Region]]) -> int:
        """The number of ranks whose gate and up rows alternate.

        ModelOpt 0.47 stores the per-channel amax of a gated `linear_fc1` in rank order, `[gate0 up0 gate1 …]`, but the
        weight as gate, then up. The cuts tell the difference: one for each rank in the amax, two in the weight. So do
        Megatron-Bridge with the lengths of DoRA, beside B, and ModelOpt with B.
        """
        if _SECTIONED.fullmatch(name) and len(self.checkpoint.cuts(regions[name][""])) > 1:
            raise CheckpointError(
                f"{self.checkpoint.directory}: {name} is per-channel and was saved by several ranks, which lose "
                "the order of its rows: export from the live model instead"
            )
        weight = regions.get(_gated_beside(name))
        if weight is None or self._spec(regions[name]).shape[:1] in ((), (1,)):
            return 1
        cuts = {part: len(self.checkpoint.cuts(region)) for part, region in weight.items()}
        ranks = cuts["w"] if "w" in cuts else cuts[""] // 2
        return ranks if len(self.checkpoint.cuts(regions[name][""])) == ranks else 1

    def _halves_apart(self, name: str, parts: Mapping[str, Region]) -> int:
        """The number of ranks whose first halves all precede their second halves.

        Megatron-Bridge saves B of `adapter_gate` and of `adapter_up` as if each were gate and up: the first half of
        each rank's rows, then the second halves.
        """
        if _HALF_OF_FC1.fullmatch(name.rstrip("0123456789")) is None:
            return 1
        return len(self.checkpoint.cuts(parts["w"])) if "w" in parts else len(self.checkpoint.cuts(parts[""])) // 2

    def _settings(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Every quantizer that ModelOpt inserted, by canonical global name, with its configuration."""
        for key in self.checkpoint.states:
            found = _STATE.fullmatch(key)
            if found is None:
                continue
            settings = quantizer_settings(self.checkpoint.state(key), f"{key} of {self.checkpoint.directory}")
            index = [int(number) for number in found[2].split(".")]
            yield from self._named_settings(found[1], index, settings)

    def _named_settings(
        self, module: str, index: list[int], settings: Settings
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The quantizers in the state of one module.

        Args:
            module: name of the module in the checkpoint.
            index: numbers of the layer and expert, if the name lacks them.
        """
        layer = index.pop(0) if _ALL_LAYERS.search(module) else None
        named = _ONE_EXPERT.search(f"{module}.")
        expert = int(named[1]) if named else index.pop(0) if _ALL_EXPERTS.search(f"{module}.") else None
        linear = _ONE_EXPERT.sub(".experts.experts.", module)
        stages = any(key.startswith(f"{module}.weight_quantizer.0.") for key in self.checkpoint.tensors)
        numbered = {} if stages else {name: found for name in settings if (found := _GROUPED.fullmatch(name))}
        grouped = len(numbered)
        for quantizer, setting in settings.items():
            of_expert = numbered.get(quantizer) if expert is not None else None
            if of_expert is not None and expert is not None and int(of_expert[1]) != expert % grouped:
                continue  # belongs to another expert of the same rank, which has a state of its own
            kind = of_expert[0].partition(".")[0] if of_expert else quantizer
            shared = self._spelling(_named(f"{linear}.{kind}", layer, None))
            if expert is None or (of_expert is None and (grouped or shared in self._with_buffers)):
                yield shared, setting
            else:
                yield self._spelling(_named(f"{linear}.{kind}", layer, expert)), setting

    @cached_property
    def _with_buffers(self) -> frozenset[str]:
        """The quantizers with state in the checkpoint."""
        return frozenset(module_of(name) for name in self.tensors if is_quantizer_state(name))

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """All quantizer buffers. Small ones and those of the key-value cache are read; others give their shape."""
        small, large = list[StoredTensor](), list[StoredTensor]()
        for name, each in self.tensors.items():
            if is_quantizer_state(name):
                is_small = each.spec.shape.count(1) == len(each.spec.shape) or "_bmm_quantizer." in name
                (small if is_small else large).append(each)
        values = self.checkpoint.read([each.regions[0] for each in small])
        yield from zip((each.name for each in small), values, strict=True)
        for each in large:
            yield each.name, each.spec.meta()
            whole = each.name.replace("._amax", "._global_amax")
            if whole not in self.tensors and each.name.endswith("._amax"):
                yield whole, self[each.name].max()

    def _experts(self) -> dict[str, tuple[int, ...]]:
        """The experts that may share a quantizer: module (`….experts.linear_fc1`) → numbers of its experts."""
        experts: dict[str, list[int]] = {}
        for name in self.tensors:
            found = _EXPERT.fullmatch(name)
            if found:
                experts.setdefault(found[1], []).append(int(found[2]))
        return {module: tuple(sorted(numbers)) for module, numbers in experts.items()}


def _one_by_one(key: str, spec: TensorSpec) -> Iterator[tuple[str, Region]]:
    """The tensors of single layers and experts inside a stored tensor."""
    layers: Iterable[int | None] = range(spec.shape[0]) if _ALL_LAYERS.search(key) else [None]
    depth = 0 if layers == [None] else 1
    experts: Iterable[int | None] = [None]
    if _ALL_EXPERTS.search(key) and not _is_shared(key, spec.shape[depth:]):
        experts = range(spec.shape[depth])
    for layer, expert in product(layers, experts):
        index = tuple(number for number in (layer, expert) if number is not None)
        yield _named(key, layer, expert), Region(key, index)


def _is_shared(key: str, shape: tuple[int, ...]) -> bool:
    """True if all experts share this tensor: an input quantizer's always, a weight quantizer's or adapter's maybe."""
    if is_adapter(key):
        return len(shape) < (2 if key.endswith("weight_magnitude") else 3)
    return is_quantizer_state(key) and ("weight_quantizer" not in key or shape[:1] in ((), (1,)))


def _share_sides(regions: dict[str, dict[str, Region]]) -> None:
    """Gives each expert the side of an adapter that all share, where each has its own other side.

    Source: `SharedOuterGroupedExpertAdapter` of Megatron-Bridge.
    """
    numbers: dict[str, list[str]] = {}
    for name in regions:
        if found := _SIDE_OF_EXPERT.fullmatch(name):
            numbers.setdefault(found[1] + found[2], []).append(found[3])
    for name in list(regions):
        found = _SIDE_OF_EXPERT.fullmatch(f"{name}0") if not name[-1].isdigit() else None
        if found is not None:
            experts = numbers.get(found[1] + {"in": "out", "out": "in"}[found[2]], ())
            regions |= {name + number: regions[name] for number in experts}
            if experts:
                del regions[name]


def _gated_beside(name: str) -> str:
    """The tensor in whose order of gate and up rows this one should be; "" if there is none."""
    if found := _WEIGHT_AMAX.fullmatch(name) if ".linear_fc1." in name else None:
        return found[1] + (found[2] or "")
    if found := _LENGTHS.fullmatch(name):
        return f"{found[1]}linear_out.weight{found[2]}"
    return found[1] + found[2][1:] if (found := _MODELOPT_B.fullmatch(name)) else ""


def _named(key: str, layer: int | None, expert: int | None) -> str:
    name = key if layer is None else _ALL_LAYERS.sub(f"layers.{layer}.", key, count=1)
    name = _ONE_EXPERT.sub(r".experts.local_experts.\1.", name)
    return _ALL_EXPERTS.sub(".experts." if expert is None else f".experts.local_experts.{expert}.", name)


def _in_order(parts: Mapping[str, Region]) -> tuple[Region, ...]:
    return tuple(parts[part] for part in _PIECES if part in parts)


def _saved_buffers(setting: Mapping[str, Any]) -> list[str]:
    """The buffers and parameters that a quantizer had when it was saved."""
    metadata = setting.get("_pytorch_state_metadata") or {}
    return [name for kind in ("buffers", "params") for name in metadata.get(kind) or {}]


def _attributes(setting: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration (`_num_bits`, …) as the attributes and properties of a live quantizer."""
    return {**setting, **{name.removeprefix("_"): value for name, value in setting.items()}}
