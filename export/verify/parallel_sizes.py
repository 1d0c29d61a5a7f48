"""The sizes of tensor and expert parallelism at which a checkpoint serves, from shapes alone.

An engine cuts column-parallel weights (q, k, v, gate, up) along their outputs and row-parallel weights (o, down) along
their inputs. Each shard must still suit the format and its kernel: the `shard_multiple` of the scheme says how.

Heads must divide, too. Key and value heads are copied if there are fewer of them than ranks.
vLLM (read in 0.32) pads a W4A16 layer that does not fit Marlin's tiles; the rule `marlin-tiles` warns of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from amaxbridge.export.architectures.engines import ENGINES
from amaxbridge.export.schemes import Scheme
from amaxbridge.export.verify.checkpoint_view import CheckpointView, Module
from amaxbridge.export.verify.finding import Problem
from amaxbridge.export.verify.name_rules import is_expert
from amaxbridge.mappings.fused_groups import group_of
from amaxbridge.mappings.model_config import number_of_experts

SIZES = (1, 2, 4, 8, 16)
_ROW_PARALLEL = ("o_proj", "down_proj", "w2", "out_proj", "dense", "fc2", "wo")
_COLUMN_PARALLEL = (
    "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3", "q_b_proj", "kv_b_proj", "in_proj_qkv",
    "in_proj_z", "fc1", "lm_head",
)  # fmt: skip
_KEYS_AND_VALUES = ("k_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class ParallelSize:
    """A size of tensor (`TP`) or expert parallelism (`EP`), and the problems with it; none if it serves."""

    axis: str
    size: int
    problems: tuple[Problem, ...]

    @property
    def serves(self) -> bool:
        return not self.problems


def parallel_sizes(
    view: CheckpointView, sizes: tuple[int, ...] = SIZES, *, whole_experts: bool = False
) -> tuple[ParallelSize, ...]:
    """Every size of TP, and of EP if there are experts, with one problem for each kind of module.

    Args:
        whole_experts: experts are spread over ranks (EP) and not cut.
    """
    tensor = [ParallelSize("TP", size, tuple(_tensor_parallel(view, size, whole_experts))) for size in sizes]
    experts = number_of_experts(view.text_config)
    if experts is None:
        return tuple(tensor)
    uneven = {size: Problem("experts", f"{experts} do not divide by {size}") for size in sizes if experts % size}
    return (*tensor, *(ParallelSize("EP", size, (uneven[size],) if size in uneven else ()) for size in sizes))


def _tensor_parallel(view: CheckpointView, size: int, whole_experts: bool) -> Iterator[Problem]:
    heads, kv_heads = (view.text_config.get(key) for key in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and heads % size:
        yield Problem("num_attention_heads", f"{heads} do not divide by {size}")
    if isinstance(kv_heads, int) and kv_heads % size and size % kv_heads:
        yield Problem("num_key_value_heads", f"{kv_heads} and {size} do not divide one another")
    kinds = dict[tuple[str, str | None, tuple[int, int]], Module]()
    for module in view.quantized:
        if module.shape is not None:
            scheme = module.scheme.name if module.scheme else None
            kinds.setdefault((module.name.rpartition(".")[2], scheme, module.shape), module)
    for module in kinds.values():
        copies = kv_heads if isinstance(kv_heads, int) and module.name.endswith(_KEYS_AND_VALUES) else size
        parts = 1 if whole_experts and is_expert(module.name) else size
        if reason := _misfit(module, parts, min(parts, copies)):
            yield Problem(module.name, reason)
        elif is_expert(module.name):
            yield from _misplaced_scales(module, parts)


def _misplaced_scales(module: Module, size: int) -> Iterator[Problem]:
    """Gate and up whose scales an engine lays out for its kernel by the number of their outputs instead of inputs.

    One group in a row has another layout than several. Cause and reproduction: docs/engines.md, "One group in a row".
    """
    assert module.shape is not None
    rows, columns = module.shape
    scheme, projection = module.scheme, module.name.rpartition(".")[2]
    if scheme is None or not scheme.group_sizes or scheme.signature.inputs or projection not in _COLUMN_PARALLEL:
        return
    width, outputs = scheme.blocks.width, rows // size
    if width is None or outputs % width or (outputs == width) == (columns == width):
        return
    for engine in ENGINES:
        if releases := engine.misplaces_single_groups:
            what = (
                f"{engine.name} {releases} gives a shard of {outputs} outputs, in groups of {width}, other rows' scales"
            )
            yield Problem(module.name, what, engine.key)


def _misfit(module: Module, size: int, column_shards: int) -> str | None:
    """Why a module cannot be cut into so many shards; None if it can."""
    assert module.shape is not None
    rows, columns = module.shape
    projection = module.name.rpartition(".")[2]
    by_rows, by_columns = projection in _ROW_PARALLEL, projection in _COLUMN_PARALLEL
    if by_rows and columns % size:
        return f"{columns} inputs do not divide by {size}"
    if by_columns and rows % column_shards:
        return f"{rows} outputs do not divide by {column_shards}"
    shard = (rows // column_shards if by_columns else rows, columns // size if by_rows else columns)
    return _misfit_of_shard(module.name, module.scheme, shard)


def _misfit_of_shard(name: str, scheme: Scheme | None, shard: tuple[int, int]) -> str | None:
    if scheme is None:
        return None
    multiple, width = scheme.shard_multiple, scheme.blocks.width
    if scheme.group_sizes and width is not None and width not in scheme.group_sizes:
        sizes = ", ".join(map(str, scheme.group_sizes))
        return f"{width} inputs share a scale, and engines have kernels for groups of {sizes}"
    may_be_short = multiple.last_may_be_short and group_of(name).members[-1] == name and not is_expert(name)
    rows, columns = shard
    if columns % multiple.inputs:
        return f"a shard has {columns} inputs, which do not divide by {multiple.inputs}"
    if rows % multiple.outputs and not may_be_short:
        return f"a shard has {rows} outputs, which do not divide by {multiple.outputs}"
    return None
