"""Refit: the quantized tensors of a model in training, after every step, from one plan.

Names, mappings, owners, buckets, schemes, shapes and memory are planned once. A run then reads what training changed:

1. Each rank looks whether its model is still the one that was planned (`Watch`), and reads its scalar amax.
2. One collective tells all ranks the amax, and whether any of them must plan anew.
3. Bucket by bucket, shards go to their owners, who join and quantize them, equal weights in one call. The shards of the
   next bucket are on their way meanwhile.

The bytes are those that `AutoBridge.save_hf_pretrained` writes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from amaxbridge.bridge.live.bundle_stream import (
    BUCKET_BYTES,
    Bucket,
    Exchange,
    Shards,
    in_buckets,
    join_bundle,
    joined_tensors,
    world_rank_of,
)
from amaxbridge.bridge.live.collect_amax import ScalarsAgain, state_parameters
from amaxbridge.bridge.live.live_model import LiveModel
from amaxbridge.bridge.live.model_walk import Parameter, Quantizer
from amaxbridge.bridge.live.quantized_parameters import PlainTensors
from amaxbridge.bridge.live.watch import Watch
from amaxbridge.bridge.plan.adapters import AdapterMode, Merge, adapter_mode, is_remeasured
from amaxbridge.bridge.plan.casting import Casting
from amaxbridge.bridge.plan.export_plan import Part
from amaxbridge.bridge.plan.tensor_decisions import decide, specs_of
from amaxbridge.export.amax.cache_scales import cache_amax
from amaxbridge.export.amax.fused_group_amax import GroupAmax, MissingAmax, MixedGroups, missing_policy, mixed_policy
from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.output.finalizer import Finalizer
from amaxbridge.export.output.stacks import Memory, can_be_stacked, stacks_of
from amaxbridge.export.schemes import Recipe, find_scheme
from amaxbridge.mappings.errors import UsageError, listing
from amaxbridge.mappings.fused_groups import group_of
from amaxbridge.mappings.model_config import ModelConfig
from amaxbridge.mappings.names import is_quantizer_state, module_of
from amaxbridge.mappings.ranks import Axis, Ranks
from amaxbridge.mappings.tensors import TensorSpec, max_of

if TYPE_CHECKING:
    from amaxbridge.bridge.auto import AutoBridge

_GPU_BUCKET_BYTES = 128 * 2**20  # a launch takes as long as a GPU needs for 30 MB
_WHOLE = 4  # times as many bytes where nothing is sent or received


@dataclass(frozen=True, slots=True)
class RefitOptions:
    """What a refit makes.

    Args:
        recipe: the scheme of each module; None to leave the weights unquantized.
        merges: True to merge adapters into the weights; False to refuse them.
        remeasured: True if the weight amax of merged weights come from the weights.
        frozen_amax: quantize every run with the amax of the plan.
        bucket_bytes: bytes of a rank's weights that are exchanged, joined and quantized together; None for the default.
    """

    recipe: Recipe | None
    missing: MissingAmax
    mixed: MixedGroups
    merges: bool = False
    remeasured: bool = False
    frozen_amax: bool = False
    bucket_bytes: int | None = None

    @classmethod
    def of(
        cls,
        scheme: str | Recipe | None,
        *,
        missing_amax: str,
        mixed_groups: str,
        adapter: str | None,
        weight_amax: str,
        frozen_amax: bool = False,
        bucket_bytes: int | None = None,
    ) -> Self:
        """The options by name.

        Raises:
            UsageError: a name is unknown, or adapters are to be written alone.
        """
        mode = adapter_mode(adapter)
        if mode is AdapterMode.ONLY:
            raise UsageError("adapter=only writes a directory (save_hf_pretrained); give adapter='merge' here")
        return cls(
            find_scheme(scheme),
            missing_policy(missing_amax),
            mixed_policy(mixed_groups),
            mode is not None,
            is_remeasured(weight_amax, mode),
            frozen_amax,
            bucket_bytes,
        )


def tensors_once(live: LiveModel, options: RefitOptions) -> Iterator[tuple[str, Tensor]]:
    """Plans, and yields the tensors that this rank owns, in memory of their own. Collective."""
    yield from _planned(live, options, once=True).tensors(_New())


class Refit:
    """Makes the tensors of a checkpoint from a live model, again and again. Collective: call it on every rank.

    Args:
        bridge: the model's bridge.
        model: this rank's model, or list of virtual-pipeline chunks, wrapped or not.
        scheme, missing_amax, mixed_groups: as in `SaveOptions`; without a scheme, the weights are unquantized.
        adapter, weight_amax: as in `SaveOptions`; adapters are merged or refused. Every run is planned then, because
            training may set other scales of adapters.
        frozen_amax: quantize every run with the amax of the plan, and collect none.
        keep_memory: fill the same tensors in every run. They are valid until the next run. False makes new ones, which
            may be kept.
        bucket_bytes: bytes of this rank's weights that are exchanged, joined and quantized together, four times as many
            where nothing is exchanged; None for 16 MiB, on a GPU 128 MiB.

    Attributes:
        specs: every tensor of the whole model, on every rank: name → shape and dtype.
        owned: names of those that this rank yields, in the order of `specs`. Together the ranks own each name once.

    Raises:
        AmaxbridgeError: as `AutoBridge.save_hf_pretrained`; the plan finds all problems.
    """

    def __init__(
        self,
        bridge: "AutoBridge",
        model: nn.Module | Sequence[nn.Module],
        *,
        scheme: str | Recipe | None = None,
        missing_amax: str = "error",
        mixed_groups: str = "error",
        adapter: str | None = None,
        weight_amax: str = "stored",
        frozen_amax: bool = False,
        keep_memory: bool = True,
        bucket_bytes: int | None = None,
    ) -> None:
        self._live = bridge.live_model(model)
        self._options = RefitOptions.of(
            scheme,
            missing_amax=missing_amax,
            mixed_groups=mixed_groups,
            adapter=adapter,
            weight_amax=weight_amax,
            frozen_amax=frozen_amax,
            bucket_bytes=bucket_bytes,
        )
        self._memory = _Kept() if keep_memory else _New()
        self._is_running = False
        self._plan: _Plan | None = _planned(self._live, self._options)
        self.specs: Mapping[str, TensorSpec] = self._plan.finalizer.output_specs
        self.owned: Sequence[str] = self._plan.owned
        self.plans = 1
        """How often this refit was planned: once, unless the model was changed."""

    def run(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors that this rank owns, from the model as it is now.

        Exhaust it on every rank: one that stops blocks the others. An unquantized tensor that needs no work may be the
        model's own.

        Raises:
            UsageError: the model was changed so that its tensors are others than `specs`; all are named. Or the last
                run was not read to its end.
            AmaxbridgeError: as for a new plan, if the model was changed.
        """
        if self._is_running:
            raise UsageError("the last run of this refit was not read to its end, or failed: make a new Refit")
        plan = self._current()
        self._is_running = True
        yield from plan.tensors(self._memory)
        self._is_running = False

    def _current(self) -> "_Plan":
        """The plan, with the amax of now; a new one if the model of any rank is no longer the planned one."""
        plan = self._plan
        if plan is not None and not self._options.merges and not plan.renew(self._live.ranks):
            return plan
        self._plan = None
        plan = _planned(self._live, self._options)
        _refuse_other_specs(self.specs, plan.finalizer.output_specs)
        self._plan, self.plans, self.owned = plan, self.plans + 1, plan.owned
        return plan


def _planned(live: LiveModel, options: RefitOptions, *, once: bool = False) -> "_Plan":
    """Plans a model as it is now. Collective.

    Args:
        once: True for a plan that is not renewed.
    """
    hf, ranks, recipe = live.hf, live.ranks, options.recipe
    watch = None if once else Watch(live.chunks)
    held, config = live.held(recipe), live.config()
    mode = AdapterMode.MERGE if options.merges else None
    bundles, merge = live.plan_merged(held, config, mode, None, remeasured=options.remeasured)
    state = live.collect_state(bundles) if recipe else QuantState()
    casting = Casting.of(hf, specs_of(bundles), None)
    first = ranks.rank(Axis.WORLD) == 0
    changed = None if merge is None else merge.changed
    policies = options.missing, options.mixed
    finalizer = decide(hf, bundles, casting, recipe, state, *policies, warn=first, changed=changed)
    quantizers = live.quantizers() if recipe else []
    again = None
    if recipe and not once and not options.frozen_amax:
        again = ScalarsAgain(quantizers, state, hf.registry, ranks)
    source = _Source(held, live.chunks, quantizers, lambda: live.held(recipe), ranks)
    size = options.bucket_bytes or (BUCKET_BYTES if source.device.type == "cpu" else _GPU_BUCKET_BYTES)
    buckets = in_buckets(bundles, ranks, bucket_bytes=size, whole_bytes=_WHOLE * size)
    works = [_Work(bucket, casting, merge, finalizer, config, ranks, source.device) for bucket in buckets]
    return _Plan(watch, source, works, finalizer, state, again, ranks)


class _Plan:
    """All that runs have in common, and the amax of the last one."""

    def __init__(
        self,
        watch: Watch | None,
        source: "_Source",
        works: "list[_Work]",
        finalizer: Finalizer,
        state: QuantState,
        again: ScalarsAgain | None,
        ranks: Ranks,
    ) -> None:
        self._watch, self._source, self._works, self._ranks = watch, source, works, ranks
        self._again, self.finalizer = again, finalizer
        me = world_rank_of(ranks)
        mine = {
            written
            for work in works
            for bundle in work.bucket.bundles
            if bundle.owner == me
            for name in bundle.specs
            if not is_quantizer_state(name)
            for written in finalizer.outputs[name]
        }
        self.owned = [name for name in finalizer.output_specs if name in mine]
        if again is not None:
            self._usable = _usable(again.values_of(state))
            self._groups = _Groups(finalizer, again.position)
            self._caches = _Caches(state, again)

    def renew(self, ranks: Ranks) -> bool:
        """Takes the amax of now; True if all ranks must plan anew. Collective."""
        assert self._watch is not None, "planned for one use"
        changed = self._watch.has_changed()
        if self._again is None:
            return bool(ranks.all_reduce_max(Axis.WORLD, torch.tensor([float(changed)]))[0] > 0)
        values, changed = self._again.collect(changed)
        changed = changed or not torch.equal(_usable(values), self._usable)  # the same on all ranks
        if not changed:
            self.finalizer.renew(self._groups.amax(values), self._caches.state(values))
        return changed

    def tensors(self, memory: Memory) -> Iterator[tuple[str, Tensor]]:
        """Yields this rank's tensors. The shards of the next bucket move while those of this one are quantized."""
        held = self._source.tensors()
        begun = list[tuple[_Work, Callable[[], Shards]]]()
        for number, work in enumerate(self._works):
            begun.append((work, work.begin(held, memory, number % 2)))
            if len(begun) > 1:
                before, wait = begun.pop(0)
                yield from before.finish(held, wait(), memory)
        for work, wait in begun:
            yield from work.finish(held, wait(), memory)


class _Work:
    """What this rank does for one bucket: its share of the exchange, and the bundles that it owns."""

    def __init__(
        self,
        bucket: Bucket,
        casting: Casting,
        merge: Merge | None,
        finalizer: Finalizer,
        config: ModelConfig,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.bucket = bucket
        self._casting, self._merge, self._finalizer = casting, merge, finalizer
        self._config, self._device = config, device
        self._exchange = None if bucket.axis is None else Exchange(bucket, ranks)
        mine = [bundle for bundle in bucket.bundles if bundle.owner == world_rank_of(ranks)]
        cast = {bundle.key: casting.specs(bundle.specs) for bundle in mine}
        in_halves = casting.target == torch.float16  # every cast is checked
        adapted = frozenset(() if merge is None else merge.adapters)
        plain = {key: specs for key, specs in cast.items() if adapted.isdisjoint(map(module_of, specs))}
        together = {key for key, specs in plain.items() if not in_halves and can_be_stacked(finalizer, specs)}
        self._alone = [bundle for bundle in mine if bundle.key not in together]
        self._together = [bundle for bundle in mine if bundle.key in together]
        self._specs = {name: spec for key in together for name, spec in cast[key].items()}
        self._stacks = stacks_of(finalizer, [cast[bundle.key] for bundle in self._together], device)
        stacked = {f"{module}.weight" for stack in self._stacks for module in stack.modules}
        names = [name for bundle in self._together for name in cast[bundle.key] if not is_quantizer_state(name)]
        self._as_they_are = [name for name in names if name not in stacked]
        self._new = {
            name
            for bundle in (self._together if self._exchange is None else ())
            for part in bundle.parts
            if not any(map(is_quantizer_state, part.tensors))
            for name in _made_by_join(part, config)
        }
        self._with_caches = [name for name in names if finalizer.cache_scale_of(name) is not None]

    def begin(self, held: Mapping[str, Tensor], memory: Memory, side: int) -> Callable[[], Shards]:
        """Begins the exchange; two buckets are on their way at most, each in memory of its own `side`."""
        if self._exchange is None:
            return dict
        if not memory.keeps:
            return self._exchange.begin(held)
        sizes = {"sent": self._exchange.sent_bytes, "received": self._exchange.received_bytes}
        send, receive = (
            memory(f"{what} {side}", TensorSpec((size,), torch.uint8), self._device) for what, size in sizes.items()
        )
        return self._exchange.begin(held, send, receive)

    def finish(self, held: Mapping[str, Tensor], shards: Shards, memory: Memory) -> Iterator[tuple[str, Tensor]]:
        """Yields what is written for this rank's bundles."""
        for each in self._alone:
            whole = join_bundle(each, held, self._config, shards)
            whole = whole if self._merge is None else self._merge(whole)
            for name, tensor in self._finalizer.finalize(self._casting.bundle(whole)):
                yield name, self._owned(name, tensor, memory)
        joined: dict[str, Tensor] = {}
        for bundle in self._together:
            joined |= joined_tensors(bundle, held, self._config, shards)
        yield from self._unquantized(joined, memory)
        yield from self._quantized(joined, memory)

    def _unquantized(self, joined: Mapping[str, Tensor], memory: Memory) -> Iterator[tuple[str, Tensor]]:
        made = {}
        for name in self._as_they_are:
            made[name] = self._owned(name, joined[name], memory)
        self._finalizer.finite.look_at_all(made)
        yield from made.items()
        for name in self._with_caches:
            scale = self._finalizer.cache_scale_of(name)
            assert scale is not None, "planned"
            yield scale

    def _owned(self, name: str, tensor: Tensor, memory: Memory) -> Tensor:
        """The tensor as it is written, not in memory that the next bucket overwrites or that is new in every run."""
        spec = self._specs.get(name, TensorSpec.of(tensor))
        moves = self._exchange is not None or name in self._new
        if spec.dtype == tensor.dtype and not (moves and memory.keeps):
            return tensor
        return memory(name, spec, tensor.device).copy_(tensor)

    def _quantized(self, joined: Mapping[str, Tensor], memory: Memory) -> Iterator[tuple[str, Tensor]]:
        rows = [stack.rows(joined, memory, place) for place, stack in enumerate(self._stacks)]
        measured: dict[str, list[Tensor]] = {}
        for stack, of_stack in zip(self._stacks, rows, strict=True):
            if stack.measured:
                for module, amax in zip(stack.modules, stack.measure(of_stack), strict=True):
                    if amax is not None:
                        measured.setdefault(group_of(module).primary, []).append(amax)
        of_groups = {primary: max_of(found) for primary, found in measured.items()}
        for stack, of_stack in zip(self._stacks, rows, strict=True):
            of_modules = [self._finalizer.amax_of(module) for module in stack.modules]
            if stack.measured:
                own = [of_groups.get(group_of(module).primary) for module in stack.modules]
                of_modules = [each._replace(weight=weight) for each, weight in zip(of_modules, own, strict=True)]
            yield from stack.quantize(of_stack, of_modules, joined, memory)


class _Source:
    """This rank's tensors, read anew in every run.

    Most are the model's own, and change with it. The state of quantizers is brought into rows again, which is quick.
    What else was made from the model's tensors (views of experts in one parameter, codes of packed weights) is made
    again by walking the model, on all ranks.
    """

    def __init__(
        self,
        held: Sequence[Parameter],
        chunks: Sequence[nn.Module],
        quantizers: Sequence[Quantizer],
        walk: Callable[[], list[Parameter]],
        ranks: Ranks,
    ) -> None:
        own = {id(each) for chunk in chunks for each in (*chunk.parameters(), *chunk.buffers())}
        self._walk, self._quantizers = walk, [each for each in quantizers if any(state_parameters([each]))]
        of_state = {each.name for each in state_parameters(self._quantizers)}
        self._held = [each for each in held if each.name not in of_state]
        self.device = next(chunks[0].parameters()).device
        derived = not all(id(each.tensor) in own for each in self._held)
        self._walks = any(ranks.all_gather_object(Axis.WORLD, derived))

    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by Megatron name. Collective if the model must be walked."""
        if self._walks:
            return PlainTensors(self._walk())
        return PlainTensors([*self._held, *state_parameters(self._quantizers)])


class _Groups:
    """Which of the collected values make the amax of each fused group."""

    def __init__(self, finalizer: Finalizer, position: Mapping[str, int]) -> None:
        made_of = {primary: names for primary, names in finalizer.amax_made_of.items() if any(names)}
        self._members = [
            [each for each in group_of(primary).members if finalizer.scheme_of(each) is not None] for primary in made_of
        ]
        self._tables = [_positions([names[of] for names in made_of.values()], position) for of in (0, 1)]
        self._has = [[bool(names[of]) for names in made_of.values()] for of in (0, 1)]

    def amax(self, values: Tensor) -> dict[str, GroupAmax]:
        """The amax of every module."""
        padded = torch.cat([values, values.new_full((1,), -torch.inf)])
        found = [padded[table].amax(1).unbind() for table in self._tables]
        amax: dict[str, GroupAmax] = {}
        columns = zip(self._members, *found, *self._has, strict=True)
        for members, weight, of_input, has_weight, has_input in columns:
            each = GroupAmax(weight if has_weight else None, of_input if has_input else None)
            for member in members:
                amax[member] = each
        return amax


class _Caches:
    """The collected values that are amax of the key-value cache."""

    def __init__(self, state: QuantState, again: ScalarsAgain) -> None:
        names = [name for name, _ in cache_amax(state)]
        self._at = {name: again.positions(name, state.amax[name]) for name in names if name in state.amax}
        quantizers = {name.removesuffix("._amax") for name in names}
        self._formats = {name: form for name, form in state.formats.items() if name in quantizers}

    def state(self, values: Tensor) -> QuantState:
        """Their amax and formats."""
        return QuantState(amax={name: values[at] for name, at in self._at.items()}, formats=self._formats)


class _Kept:
    """Memory that is given again for the same name."""

    keeps = True

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def __call__(self, name: str, spec: TensorSpec, device: torch.device) -> Tensor:
        held = self._tensors.get(name)
        if held is None or held.numel() < spec.nbytes:
            held = self._tensors[name] = torch.zeros(spec.nbytes, dtype=torch.uint8, device=device)
        return held[: spec.nbytes].view(spec.dtype).view(spec.shape)


class _New:
    """New memory each time."""

    keeps = False

    def __call__(self, name: str, spec: TensorSpec, device: torch.device) -> Tensor:
        return torch.empty(spec.shape, dtype=spec.dtype, device=device)


def _made_by_join(part: Part, config: ModelConfig) -> list[str]:
    """The tensors of a whole part that are no views of it."""
    whole = part.shard.meta()
    joined = part.mapping.join([whole], config)
    return [
        name for name, tensor in joined.items() if tensor.untyped_storage()._cdata != whole.untyped_storage()._cdata
    ]


def _usable(values: Tensor) -> Tensor:
    """True for amax that make a scale."""
    return (values > 0) & (values < torch.inf)


def _positions(lists: Sequence[Sequence[str]], position: Mapping[str, int]) -> Tensor:
    """The positions of the names in each list, filled up with the one behind all: `[lists, most names]`."""
    longest = max(map(len, lists), default=0) or 1
    rows = [[position[name] for name in names] + [len(position)] * (longest - len(names)) for names in lists]
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), longest)


def _refuse_other_specs(announced: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec]) -> None:
    """Refuses a model whose tensors are others than those that an engine was told of."""
    names = [name for name in {**announced, **found} if announced.get(name) != found.get(name)]
    if names:
        rows = [f"{name}: {announced.get(name, 'none')}, now {found.get(name, 'none')}" for name in names]
        raise UsageError(
            f"the model was changed: {len(names)} of its tensors are not as this refit announced them:{listing(rows)}\n"
            "Undo the change, or make a new Refit and tell the engine its specs"
        )
