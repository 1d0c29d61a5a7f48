"""Turning Hugging Face weights into the written tensors: the last step of every export, from Megatron or from files.

A finalizer is made once, from the specs of all tensors and the quantizer state, and finds every problem then. After
that comes one call for each bundle, in any order, on any rank.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from amaxbridge.export.amax.cache_scales import (
    PER_HEAD,
    PER_TENSOR,
    CacheFormat,
    CacheScales,
    cache_amax,
    cache_scales,
)
from amaxbridge.export.amax.fused_group_amax import (
    DATA_FREE,
    BlockAmax,
    GroupAmax,
    MissingAmax,
    MixedGroups,
    share_amax,
)
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.architectures.facts import GUESS, Knowledge
from amaxbridge.export.architectures.modelopt_matchers import excluded_entries
from amaxbridge.export.disk.row_chunks import Rows, WholeTensor, Written
from amaxbridge.export.kernels.arithmetic import Arithmetic
from amaxbridge.export.modelopt_config import hf_quant_config, in_config_json
from amaxbridge.export.output.config_and_index import quantization_config
from amaxbridge.export.output.module_schemes import (
    Ignored,
    check_blocks_are_whole,
    check_can_be_quantized,
    check_no_format_is_lost,
    check_no_state_is_lost,
    check_one_format,
    check_vectors_have_places,
    choose_schemes,
    names_elsewhere,
    unified_modules,
    unquantized_modules,
)
from amaxbridge.export.output.nonfinite import FiniteCheck, NonFinite
from amaxbridge.export.schemes import COMPRESSED_TENSORS, MODELOPT_FORMAT, Recipe, Scheme
from amaxbridge.export.schemes.scheme import naming, quantize_group
from amaxbridge.mappings.amax import (
    INPUT_QUANTIZER,
    LEARNED_POST,
    LEARNED_PRE,
    PRE_QUANT_SCALE,
    STORED_SCALES,
    WEIGHT_QUANTIZER,
)
from amaxbridge.mappings.errors import AmaxError, MappingError, UsageError, listing
from amaxbridge.mappings.fused_groups import group_of, groups_among
from amaxbridge.mappings.names import is_quantizer_state, module_of
from amaxbridge.mappings.tensors import TensorSpec

NOTHING_KEPT: Mapping[str, Scheme] = MappingProxyType({})
CACHE_SCALES = (".k_scale", ".v_scale")
"""Ends of the names of a key-value cache's scales."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """The unit of work: all tensors of one fused group of Hugging Face modules.

    Args:
        tensors: weights, biases, norms by name.
        state: per-channel or per-block quantizer state by name (`….weight_quantizer._amax`), rows as in the weight.
        key: name of the bundle, the same in every run.
    """

    tensors: Mapping[str, Rows]
    state: Mapping[str, Tensor]
    key: str = ""

    @classmethod
    def of(cls, mixed: Mapping[str, Tensor], key: str = "") -> Self:
        """Makes a bundle of tensors in memory, split into weights and quantizer state."""
        state = {name: tensor for name, tensor in mixed.items() if is_quantizer_state(name)}
        return cls({name: WholeTensor(tensor) for name, tensor in mixed.items() if name not in state}, state, key)


@dataclass(frozen=True, slots=True)
class FoldedVectors:
    """The tensors that may take the vectors by which input quantizers multiply inputs.

    Args:
        norms: weight of a norm → the vectors, all equal, of the modules that it feeds.
        rows: vector → the module whose outputs make these inputs, and whose rows may take it.
        zero_centred: True if norms multiply by `1 + weight`.
    """

    norms: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, str]
    zero_centred: bool = False

    def fold_norm(self, weight: Tensor, vector: Tensor) -> Tensor:
        """The weight with which the norm's output is already multiplied, as ModelOpt's exporter makes it."""
        one = 1.0 if self.zero_centred else 0.0
        return ((weight.float() + one) * vector.float() - one).to(weight.dtype)


_NO_VECTORS = FoldedVectors({}, {})


@dataclass(frozen=True, slots=True)
class ChangedWeights:
    """Weights that are not those that quantizers were calibrated on: adapters are merged into them.

    Args:
        modules: the modules whose weights have changed.
        remeasured: True if the weight amax of their fused groups come from the weights. Otherwise those of training
            must cover the weights.
    """

    modules: frozenset[str] = frozenset()
    remeasured: bool = False

    def keep(self, modules: Iterable[str]) -> set[str]:
        """The modules whose weight amax is that of training."""
        groups = {group_of(module).primary for module in self.modules} if self.remeasured else set()
        return {module for module in modules if group_of(module).primary not in groups}

    def check_covered(self, weights: Mapping[str, Rows], amax: Tensor | None, blocks: Mapping[str, BlockAmax]) -> None:
        """Compares the weights of a fused group that have changed with their amax.

        Args:
            amax: of the group; None if it comes from the weights.
            blocks: module → amax of each block, if training kept them.

        Raises:
            AmaxError: weights are larger than their amax; all are named.
        """
        found = []
        for module in () if self.remeasured else self.modules & weights.keys():
            for _, rows in weights[module].parts():
                largest, held = rows.abs().amax().float(), amax
                if module in blocks:
                    held = blocks[module].stored
                    down, across = (size // count for size, count in zip(rows.shape, held.shape, strict=True))
                    largest = rows.abs().unflatten(1, (-1, across)).unflatten(0, (-1, down)).amax((1, 3)).float()
                if held is not None and (largest > held).any():
                    found.append(f"{module}: {largest.max():g}, but the amax is {held.max():g}")
        if found:
            raise AmaxError(
                f"weights with adapters merged in are larger than the amax of training:{listing(sorted(found))}\n"
                "amax.weights=remeasure (weight_amax= in Python) takes weight amax anew from the merged weights"
            )


_UNCHANGED = ChangedWeights()


class Finalizer:
    """Decides what is written for each tensor, and makes it.

    Args:
        specs: every Hugging Face tensor of the model, including per-channel and per-block quantizer state.
        recipe: the scheme of each module, from `find_scheme`; None to write everything unquantized.
        state: per-tensor amax and formats from training; None to quantize what the recipe targets without data.
        missing: what to do about an unusable amax.
        kept: modules that the tensors hold quantized already → their scheme. They are written as they are.
        vectors: the tensors that may take vectors of input quantizers.
        knowledge: what is known of the model's architecture.
        mixed: what to do about fused groups whose members have several formats.
        changed: weights that are not those that were calibrated.

    Raises:
        UsageError: there is nothing to quantize, or the quantizers hold state that the schemes cannot store.
        MappingError: a module cannot be quantized as asked; every such module is named.
        AmaxError: a needed amax is missing or unusable.
    """

    def __init__(
        self,
        specs: Mapping[str, TensorSpec],
        recipe: Recipe | None,
        state: QuantState | None,
        *,
        missing: MissingAmax = MissingAmax.ERROR,
        kept: Mapping[str, Scheme] = NOTHING_KEPT,
        vectors: FoldedVectors = _NO_VECTORS,
        knowledge: Knowledge = GUESS,
        mixed: MixedGroups = MixedGroups.ERROR,
        changed: ChangedWeights = _UNCHANGED,
    ) -> None:
        self._changed = changed
        self._vectors, self._specs = vectors, specs
        self._of_rows: dict[str, str] = {}  # module → the vector that its rows take
        self._knowledge = knowledge
        self.format = COMPRESSED_TENSORS if recipe is None else recipe.format
        check_one_format(self.format, kept)
        tensors = {name: spec for name, spec in specs.items() if not is_quantizer_state(name)}
        linears = [module_of(name) for name, spec in tensors.items() if _is_linear(name, spec)]
        linears = [module for module in linears if module not in kept]
        self.kept = kept
        self._kept_cache = _kept_cache(self.format, tensors)
        self._schemes: dict[str, Scheme] = {}
        self._amax: dict[str, GroupAmax] = {}
        self.amax_made_of: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self._cache = CacheScales(None, {})
        self.filled: dict[str, str] = {}
        self.finite = FiniteCheck(NonFinite.WARN)
        self.data_free = recipe is not None and state is None
        self.unified: list[str] = []
        if recipe is not None:
            treated = {module: recipe.scheme_of(module, state, knowledge.stays_unquantized) for module in linears}
            self.unified = unified_modules(treated, state, kept, mixed)
            ignored = Ignored(recipe.ignore, frozenset(self.unified))
            treated |= dict.fromkeys(self.unified)
            self._schemes = choose_schemes(recipe.name, treated, state, kept, ignored)
            check_can_be_quantized(self._schemes, tensors, knowledge)
            if state is not None:
                check_no_format_is_lost(recipe.name, state, {*self._schemes, *kept}, ignored)
                check_blocks_are_whole(self._schemes, specs)
                self._take(ignored, state, specs, missing)
        self.outputs = self._plan(tensors)
        self.left = [module for module in linears if module not in self._schemes]
        self.ignore = unquantized_modules(self.left, {name: spec.shape for name, spec in tensors.items()}, knowledge)

    @property
    def output_specs(self) -> dict[str, TensorSpec]:
        """Every tensor that is written."""
        return {name: spec for made in self.outputs.values() for name, spec in made.items()}

    @property
    def quantized(self) -> list[str]:
        """The quantized modules: those that are kept, and the others in the order of the model."""
        return [*self.kept, *self._schemes]

    @property
    def scheme_names(self) -> dict[str, str]:
        """Quantized module → the name of its scheme."""
        return {module: scheme.name for module, scheme in self.written.items()}

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """`quantization_config` of config.json; None if nothing is quantized."""
        if not self.written:
            return None
        if (said := self.hf_quant_config) is not None:
            return in_config_json(said)
        others = partial(names_elsewhere, self._knowledge)
        return quantization_config(self.written, self.ignore, cache=self.cache, other_names=others)

    @property
    def hf_quant_config(self) -> dict[str, Any] | None:
        """hf_quant_config.json; None in compressed-tensors, or if nothing is quantized."""
        if self.format != MODELOPT_FORMAT or not self.written:
            return None
        excluded = excluded_entries(self.ignore, self.written)
        return hf_quant_config(self.written, excluded, cache=self.cache)

    @property
    def cache(self) -> CacheFormat | None:
        """The format of the key-value cache, of which there are scales; None without."""
        return self._cache.format or self._kept_cache

    @property
    def written(self) -> dict[str, Scheme]:
        """Quantized module → its scheme."""
        return {**self.kept, **self._schemes}

    @property
    def fingerprint(self) -> str:
        """A text that identifies what is made of the tensors: the scheme and the amax of every module."""
        decided = {
            module: (_identity(scheme), *map(_exactly, self._amax.get(module, DATA_FREE)))
            for module, scheme in self.written.items()
        }
        caches = {name: scale.tolist() for name, scale in self._cache.tensors.values()}
        folded = [*sorted(name for name in self._vectors.norms if self._vector_of_norm(name)), *sorted(self._of_rows)]
        parts = [decided, caches, *([folded] if folded else [])]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def finalize(self, bundle: Bundle) -> Iterator[tuple[str, Tensor]]:
        """As `finalize_rows`, for a bundle in memory: name and whole tensor of each."""
        for name, _, tensor in self.finalize_rows(bundle):
            yield name, tensor

    def finalize_rows(self, bundle: Bundle) -> Iterator[Written]:
        """Yields what is written for a bundle.

        Raises:
            MappingError: a weight to be quantized holds NaN or Inf; or an unquantized one, if `finite` says so.
            AmaxError: a changed weight is larger than its amax.
        """
        quantized = dict[str, Rows]()
        for name, tensor in bundle.tensors.items():
            module = self._quantized_module(name)
            stored = None if module is None else bundle.state.get(module + STORED_SCALES)
            if module is not None and stored is not None:
                yield from self._adopted(module, tensor, stored)
            elif module is None:
                for first, rows in tensor.parts():
                    self.finite.look_at(name, rows)
                    yield Written(name, first, self._folded(name, first, rows, bundle.state))
            else:
                quantized[module] = tensor
            if name in self._cache.tensors:
                scale, value = self._cache.tensors[name]
                yield Written(scale, 0, value)
        for group in groups_among(quantized):
            weights = {member: quantized[member] for member in group.members}
            blocks = {member: amax for member in group.members if (amax := self._block_amax(member, bundle.state))}
            shared = self._amax.get(group.primary)
            self._changed.check_covered(weights, None if shared is None else shared.weight, blocks)
            yield from quantize_group(self._schemes[group.primary], weights, shared, blocks)

    def _folded(self, name: str, first: int, rows: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Some rows of an unquantized tensor, multiplied by the vectors that it takes.

        A norm takes that of the quantized modules which it feeds, a weight its own in its columns, and a weight or bias
        in its rows that of the module whose inputs it makes.
        """
        of_norm = self._vector_of_norm(name)
        if of_norm is not None:
            return self._vectors.fold_norm(rows, state[of_norm])
        columns = state.get(module_of(name) + PRE_QUANT_SCALE) if name.endswith(".weight") else None
        factors = self._factors_of_rows(module_of(name), state)
        if columns is None and factors is None:
            return rows
        product = rows.float() if columns is None else rows.float() * columns
        if factors is not None:
            product = product * factors[first : first + len(rows)].reshape(-1, *[1] * (rows.ndim - 1))
        return product.to(rows.dtype)

    def _block_amax(self, module: str, state: Mapping[str, Tensor]) -> BlockAmax | None:
        stored = state.get(module + WEIGHT_QUANTIZER, state.get(module + LEARNED_POST))
        if stored is None:
            return None
        amax, factors = BlockAmax(stored, state.get(module + LEARNED_PRE)), self._factors_of_rows(module, state)
        return amax if factors is None else amax.times(factors)

    def _factors_of_rows(self, module: str, state: Mapping[str, Tensor]) -> Tensor | None:
        """The vector that multiplies the rows of a module, `[out]`.

        Raises:
            MappingError: a factor is zero, negative or not finite, so that no scale can take it.
        """
        vector = self._of_rows.get(module)
        if vector is None:
            return None
        factors = state[vector]
        if not (factors.isfinite() & (factors > 0)).all():
            raise MappingError(
                f"{vector} is between {factors.min():g} and {factors.max():g}, and {module} would take it: all values "
                "must be positive and finite; calibrate again"
            )
        return factors

    def _adopted(self, module: str, codes: Rows, scales: Tensor) -> Iterator[Written]:
        """Yields what is written for a weight that training keeps as codes and scales, in rows of the weight."""
        height = self._schemes[module].blocks.height or len(scales)
        of_blocks = scales[::height].contiguous()
        if not torch.equal(of_blocks.repeat_interleave(height, 0)[: len(scales)], scales):
            raise MappingError(f"{module}: rows of one block of {height} have several scales")
        for _, whole in codes.parts():
            with naming(module):
                tensors = self._schemes[module].adopt(whole, of_blocks)
            for name, tensor in tensors.items():
                yield Written(f"{module}.{name}", 0, tensor)

    def _take(self, ignored: Ignored, state: QuantState, specs: Mapping[str, TensorSpec], missing: MissingAmax) -> None:
        """Takes from the state what the chosen schemes write, and refuses what none of them can store."""
        inputs = {module for module, scheme in self._schemes.items() if scheme.needs_input_amax}
        weights = {
            module
            for module, scheme in self._schemes.items()
            if scheme.needs_weight_amax or module + WEIGHT_QUANTIZER in state.missing
        }
        self._cache = cache_scales(state, specs, files=self.format)
        written = {module + INPUT_QUANTIZER for module in inputs} | {name for name, _ in cache_amax(state)}
        known = {name for name in {*specs, *state.amax} if is_quantizer_state(name)}
        known -= {name for name in known if ignored.holds(name.rsplit(".", 2)[0])}
        in_norms = {name for vectors in self._vectors.norms.values() for name in vectors}
        vectors = {name for name in known if name.endswith(PRE_QUANT_SCALE)}
        in_weights = {name for name in vectors if name.removesuffix(PRE_QUANT_SCALE) not in self._schemes}
        homeless = {name: self._why_not_in_rows(name, specs, state) for name in vectors - in_norms - in_weights}
        check_vectors_have_places({name: why for name, why in homeless.items() if why})
        self._of_rows = {self._vectors.rows[name]: name for name in homeless}
        check_no_state_is_lost(known - written - vectors)
        shared = share_amax(state, self._changed.keep(weights), inputs, missing=missing)
        self._amax = {module: shared.by_module.get(module, GroupAmax(None, None)) for module in self._schemes}
        self.filled, self.amax_made_of = shared.filled, shared.made_of

    def renew(self, amax: Mapping[str, GroupAmax], caches: QuantState) -> None:
        """Takes other amax for the same quantizers, as after a step of training.

        Args:
            amax: by module, for all members of fused groups.
            caches: the amax and formats of the key-value cache's quantizers.
        """
        self._amax |= {module: each for module, each in amax.items() if module in self._schemes}
        self._cache = cache_scales(caches, self._specs, files=self.format)

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme that a module is quantized with; None if it is written unquantized, or kept."""
        return self._schemes.get(module)

    def amax_of(self, module: str) -> GroupAmax:
        """The amax that a quantized module is written with."""
        return self._amax.get(module, DATA_FREE)

    def cache_scale_of(self, name: str) -> tuple[str, Tensor] | None:
        """Name and tensor of the scale of the key-value cache that is written with a weight."""
        return self._cache.tensors.get(name)

    def changes_values(self, name: str, state: Collection[str]) -> bool:
        """True if a tensor takes a vector of an input quantizer, or is stored as codes already.

        Args:
            state: the names of the quantizer state in its bundle.
        """
        module = module_of(name)
        return (
            self._vector_of_norm(name) is not None
            or module in self._of_rows
            or any(module + each in state for each in (PRE_QUANT_SCALE, STORED_SCALES))
        )

    def _plan(self, specs: Mapping[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
        """Tensor → what is written for it."""
        planned: dict[str, dict[str, TensorSpec]] = {}
        problems = []
        for name, spec in specs.items():
            module = self._quantized_module(name)
            try:
                planned[name] = {name: spec} if module is None else self._specs_of(module, spec)
            except ValueError as error:
                problems.append(f"{name}: {error}")
            if name in self._cache.tensors:
                scale, tensor = self._cache.tensors[name]
                planned[name] = {scale: TensorSpec.of(tensor), **planned[name]}
        if problems:
            raise MappingError(
                f"{len(problems)} weights cannot be quantized:{listing(problems)}\n"
                "Name them in ignore, or choose a scheme with smaller blocks, or without (fp8_dynamic, w8a8)"
            )
        return planned

    def _specs_of(self, module: str, weight: TensorSpec) -> dict[str, TensorSpec]:
        """Yields what is written for a quantized module."""
        arithmetic = self._amax.get(module, DATA_FREE).arithmetic
        specs = self._schemes[module].tensor_specs(weight, arithmetic)
        return {f"{module}.{name}": spec for name, spec in specs.items()}

    def _vector_of_norm(self, name: str) -> str | None:
        """The vector that multiplies a norm: that of the quantized modules which it feeds."""
        vectors = self._vectors.norms.get(name, ())
        return next((each for each in vectors if each.removesuffix(PRE_QUANT_SCALE) in self._schemes), None)

    def _why_not_in_rows(self, vector: str, specs: Mapping[str, TensorSpec], state: QuantState) -> str:
        """Why no rows of another module can take a vector; "" if they can."""
        module = self._vectors.rows.get(vector)
        if module is None:
            return "no norm or linear alone makes these inputs"
        inputs, rows = specs[vector].shape[0], specs[f"{module}.weight"].shape[0]
        scheme, owner = self._schemes.get(module), module.rpartition(".")[0]
        if inputs != rows:
            return f"query heads share the {rows} values that {module} makes for {inputs} inputs"
        if module.endswith(".v_proj") and f"{owner}.v_bmm_quantizer" in state.formats:
            return f"the key-value cache quantizes what {module} makes"
        if scheme is not None and not (scheme.has_free_row_scales and module + WEIGHT_QUANTIZER in specs):
            return f"the scales of {module} in {scheme.name} cannot take a factor for each row"
        return ""

    def is_quantized(self, name: str) -> bool:
        """True if the tensor is a weight to be quantized."""
        return self._quantized_module(name) is not None

    def _quantized_module(self, name: str) -> str | None:
        module = module_of(name)
        return module if name.endswith(".weight") and module in self._schemes else None


def _kept_cache(name: str, specs: Mapping[str, TensorSpec]) -> CacheFormat | None:
    """The format of cache scales that the tensors hold already; they are FP8's.

    Raises:
        UsageError: files of this format cannot say it.
    """
    scales = [spec for name, spec in specs.items() if name.endswith(CACHE_SCALES)]
    kept = PER_HEAD if any(len(spec.shape) > 1 or spec.shape[:1] not in ((), (1,)) for spec in scales) else PER_TENSOR
    if scales and name not in kept.files:
        raise UsageError(
            f"format={name} has no place for a key-value cache in {kept.words}\nWrite format={kept.files[0]}"
        )
    return kept if scales else None


def _identity(scheme: Scheme) -> dict[str, Any]:
    return scheme.config_group | ({"scales": scheme.scales} if scheme.scales else {})


def _exactly(value: Tensor | Arithmetic | None) -> str:
    return float(value).hex() if isinstance(value, Tensor) else str(value)


def _is_linear(name: str, spec: TensorSpec) -> bool:
    return name.endswith(".weight") and len(spec.shape) == 2
