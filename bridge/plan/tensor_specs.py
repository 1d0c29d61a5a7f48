"""The tensors of a model without its weights: Hugging Face tensors by name, and the Megatron tensors made from them.

Names and shapes come from transformers' own model, built on the meta device, and from transformers' conversion of names
to those in files. Layers for multi-token prediction (MTP), which transformers does not build, are added. There is no
second table of shapes that could disagree.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import product

from torch import Tensor

from amaxbridge.bridge.hf import HFModel
from amaxbridge.export.disk.packed_experts import sources_in
from amaxbridge.mappings.errors import UsageError, listing
from amaxbridge.mappings.extras import need
from amaxbridge.mappings.hybrid_layers import read_pattern
from amaxbridge.mappings.lines_to_add import lines_to_add
from amaxbridge.mappings.mapping import MegatronParamMapping
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.names import kind_of, natural_key
from amaxbridge.mappings.tensors import TensorSpec
from amaxbridge.mappings.weights import VocabParallelMapping


def hf_tensors(hf: HFModel) -> dict[str, Tensor]:
    """Every tensor of the language model in its files, on the meta device, with experts one by one.

    Raises:
        UsageError: transformers cannot build the model.
        MissingExtraError: transformers is not installed.
    """
    if hf.file_tensors is None and hf.family.file is not None:
        raise UsageError(
            f"nothing says which tensors {', '.join(hf.family.architectures)} has: give hf= a directory with its "
            f"weights, or register its class with transformers in {hf.family.file}"
        )
    if hf.file_tensors is None:
        need("The list of a model's tensors", "transformers")
        raise UsageError(
            f"transformers builds no causal language model from {hf.source}: correct its architectures and model_type"
        )
    tensors = hf.file_tensors
    if hf.family.classifier_of:  # predicts no tokens
        return dict(_one_by_one(hf, tensors))
    mtp = {**_mtp_layers(hf, tensors), **_own_mtp_layers(hf, tensors), **_hybrid_mtp_layers(hf, tensors)}
    return dict(_one_by_one(hf, {**tensors, **mtp}))


class MegatronSpecs:
    """The Megatron tensors of a model, and the shapes of their shards.

    Args:
        hf: the model.
        config: its sizes; `hf.model_config` unless the vocabulary is padded.
        held: the Megatron tensors of a checkpoint, if there is one: the message names those without a mapping, too.

    Raises:
        UsageError: transformers cannot build the model, or the model has tensors that no mapping takes, which an
            export would drop; all are named.
    """

    def __init__(self, hf: HFModel, config: ModelConfig, *, held: Mapping[str, TensorSpec] | None = None) -> None:
        self._tensors = hf_tensors(hf)
        self._config = config
        self._registry = hf.registry
        self._known: dict[tuple[object, ...], TensorSpec] = {}
        self.mappings: dict[str, MegatronParamMapping] = {}
        for name in self._tensors:
            mapping = hf.registry.hf_to_megatron_lookup(name)
            if mapping is not None:
                self.mappings.setdefault(mapping.megatron_param, mapping)
        taken = {target for mapping in self.mappings.values() for target in mapping.targets}
        left = {name: TensorSpec.of(tensor) for name, tensor in self._tensors.items() if name not in taken}
        if left:
            raise UsageError(
                f"{hf.source} describes a model with tensors that no mapping of its family takes:"
                f"{listing(f'{kind}: {left[name]}' for kind, name in _by_kind(left))}\n"
                f"Correct config.json, or {lines_to_add(hf.registry, megatron=held or {}, hf=left)}"
            )

    def shard(self, name: str, size: int) -> TensorSpec:
        """Shape and dtype of a parameter's shard, if sharded over `size` ranks; computed once for all alike."""
        mapping = self.mappings[name]
        tensors = {target: self._tensors[target] for target in mapping.targets}
        key = kind_of(name), size, *(TensorSpec.of(tensor) for tensor in tensors.values())
        if key not in self._known:
            self._known[key] = TensorSpec.of(mapping.split(tensors, self._config, 0, size))
        return self._known[key]

    def disagreements(self, found: Mapping[str, TensorSpec]) -> list[str]:
        """One line for each kind of tensor that `found` (by global Megatron name) lacks, adds, or has in another shape.

        A vocabulary may be padded. The plan refuses names that no mapping takes.
        """
        missing = [name for name in self.mappings if name not in found]
        more = [name for name in found if name not in self.mappings and self._registry.megatron_to_hf_lookup(name)]
        other = [name for name in self.mappings if name in found and not self._fits(found[name], name)]
        return [
            *(f"{kind}: {found[name]}, {self.shard(name, 1)} expected" for kind, name in _by_kind(other)),
            *(f"{kind}: missing, {self.shard(name, 1)} expected" for kind, name in _by_kind(missing)),
            *(f"{kind}: {found[name]}, which the model does not have" for kind, name in _by_kind(more)),
        ]

    def _fits(self, found: TensorSpec, name: str) -> bool:
        """True if a tensor has the model's shape; a vocabulary may be padded."""
        expected = self.shard(name, 1)
        if isinstance(self.mappings[name], VocabParallelMapping):
            return found.shape[1:] == expected.shape[1:] and found.shape[0] >= expected.shape[0]
        return found.shape == expected.shape


def _by_kind(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each kind with its count, and one of its names."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    for kind, members in kinds.items():
        yield (members[0] if len(members) == 1 else f"{kind} ({len(members):,} of them)"), members[0]


def _one_by_one(hf: HFModel, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Unpacks experts: the tensors of each expert in place of the packed ones."""
    layout = hf.family.packed_experts
    for name, tensor in tensors.items():
        sources = sources_in(name, tuple(tensor.shape), layout) if layout is not None else {}
        if not sources:
            yield name, tensor
        for single, source in sources.items():
            yield single, source.cut(tensor[source.expert])


def _mtp_layers(hf: HFModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DeepSeek's MTP layers: each like the last decoder layer, with the tensors around it.

    Each has an indexer if the model has any, also where the last decoder layer shares another's.
    """
    count = hf.config.get("num_nextn_predict_layers", 0)
    first = hf.config.get("num_hidden_layers", 0)
    last = f"model.layers.{first - 1}."
    if not count or f"{last}input_layernorm.weight" not in tensors or _has_own_mtp(hf):
        return {}
    inner = {name.removeprefix(last): tensor for name, tensor in tensors.items() if name.startswith(last)}
    if indexed := [name for name in tensors if name.endswith(".self_attn.indexer.wk.weight")]:
        like = max(indexed, key=natural_key).removesuffix("self_attn.indexer.wk.weight")
        indexer = f"{like}self_attn.indexer."
        inner |= {name.removeprefix(like): tensor for name, tensor in tensors.items() if name.startswith(indexer)}
    norm, hidden = tensors["model.norm.weight"], hf.config["hidden_size"]
    inner |= dict.fromkeys(("enorm.weight", "hnorm.weight", "shared_head.norm.weight"), norm)
    inner["eh_proj.weight"] = norm.new_empty(hidden, 2 * hidden)
    inner["embed_tokens.weight"] = inner["shared_head.head.weight"] = tensors["model.embed_tokens.weight"]
    return {f"model.layers.{first + n}.{name}": tensor for n in range(count) for name, tensor in inner.items()}


def _own_mtp_layers(hf: HFModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MTP layers under names of their own, as Qwen3-Next's and MiMo's: like the last decoder layer with attention."""
    count = hf.family.weight_settings(hf.config).get("mtp_num_layers")
    if not _has_own_mtp(hf) or not count:
        return {}
    (norm_name,) = _target(hf, "decoder.final_layernorm.weight")
    norm, hidden = tensors[norm_name], hf.config["hidden_size"]
    attending = [name for name in tensors if name.endswith(".self_attn.o_proj.weight")]
    like = max(attending, key=natural_key).removesuffix("self_attn.o_proj.weight")
    inner = {name.removeprefix(like): tensor for name, tensor in tensors.items() if name.startswith(like)}
    made: dict[str, Tensor] = {}
    for layer in (f"mtp.layers.{depth}" for depth in range(count)):
        (first,) = _target(hf, f"{layer}.mtp_model_layer.input_layernorm.weight")
        made |= {first.removesuffix("input_layernorm.weight") + name: tensor for name, tensor in inner.items()}
        for around in ("enorm", "hnorm", "final_layernorm"):
            made |= dict.fromkeys(_target(hf, f"{layer}.{around}.weight"), norm)
        made |= dict.fromkeys(_target(hf, f"{layer}.eh_proj.weight"), norm.new_empty(hidden, 2 * hidden))
    return made


def _has_own_mtp(hf: HFModel) -> bool:
    """True if the files have MTP layers under names of their own, not behind the decoder's."""
    elsewhere = any(not name.startswith("model.layers.") for name in _target(hf, "mtp.layers.0.eh_proj.weight"))
    return elsewhere and hf.family.hybrid_pattern is None  # those of hybrids are in `_hybrid_mtp_layers`


def _target(hf: HFModel, megatron_param: str) -> tuple[str, ...]:
    mapping = hf.registry.megatron_to_hf_lookup(megatron_param)
    return mapping.targets if mapping else ()


def _hybrid_mtp_layers(hf: HFModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Nemotron-H's MTP layers: each like the first decoder layer of its kind, with the tensors around it."""
    if hf.family.hybrid_pattern is None:
        return {}
    decoder, kinds, depths = read_pattern(hf.family.layer_pattern(hf.config))
    if not depths:
        return {}
    norm, hidden = tensors["backbone.norm_f.weight"], hf.config["hidden_size"]
    first = {"enorm.weight": norm, "hnorm.weight": norm, "eh_proj.weight": norm.new_empty(hidden, 2 * hidden)}
    made: dict[str, Tensor] = {}
    for depth, (place, kind) in product(range(depths), enumerate(kinds)):
        like = f"backbone.layers.{decoder.index(kind)}."
        inner = {name.removeprefix(like): tensor for name, tensor in tensors.items() if name.startswith(like)}
        inner |= first if place == 0 else {}
        inner |= {"final_layernorm.weight": norm} if place == len(kinds) - 1 else {}
        made |= {f"mtp.layers.{depth * len(kinds) + place}.{name}": tensor for name, tensor in inner.items()}
    return made
