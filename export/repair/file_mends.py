"""Mends of files and names: tensors that are there twice or belong to nothing, the index, dtypes and shapes."""

import re
from collections.abc import Iterable, Iterator

import torch

from amaxbridge.export.architectures.facts import architecture_of
from amaxbridge.export.disk.safetensors_file import StoredTensor
from amaxbridge.export.output.config_and_index import INDEX_FILE
from amaxbridge.export.repair.edits import Change, Edits, Found, Given, Refusal
from amaxbridge.export.repair.mend import Mend, Unseen
from amaxbridge.export.repair.mended_view import MendedView
from amaxbridge.export.verify.checkpoint_view import QUANTIZED_SUFFIXES, Module, Place
from amaxbridge.mappings.names import is_quantizer_state, natural_key
from amaxbridge.mappings.tensors import TensorSpec

_ZERO_POINT = "weight_zero_point"
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
_MOST_FILES = 100_000
_FLOATS = (torch.float64, torch.bfloat16, torch.float16)


def _duplicates(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    places: dict[str, list[Place]] = {}
    for name, place in view.places:
        places.setdefault(name, []).append(place)
    for name, several in places.items():
        if len(several) < 2:
            continue
        files = [place.file for place in several]
        kept = view.weight_map.get(name)
        if kept not in files:
            if not all(_is_same(several[0].stored, place.stored) for place in several[1:]):
                yield Refusal(
                    name, f"is in {' and in '.join(files)}, with different bytes, and the index names neither"
                )
                continue
            kept = files[0]
        for file in files:
            if file != kept:
                why = "the index names" if name in view.weight_map else "the same bytes are in"
                yield Change(name, f"removed from {file}: {why} {kept}", Edits(dropped=frozenset({(file, name)})))


def _is_same(one: StoredTensor, other: StoredTensor) -> bool:
    if one.spec != other.spec:
        return False
    pairs = zip(one.parts(), other.parts(), strict=True)
    return all(torch.equal(_raw(mine.rows), _raw(theirs.rows)) for mine, theirs in pairs)


def _raw(rows: torch.Tensor) -> torch.Tensor:
    return rows.contiguous().reshape(-1).view(torch.uint8)


def _leftovers(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    """Quantizers' buffers and scales of other formats. Whatever might change a weight or an input is refused."""
    for name, stored in view.tensors.items():
        module, _, suffix = name.rpartition(".")
        owner = view.modules.get(module)
        if owner is not None and suffix in view.planned(owner):
            continue
        is_scale = suffix in ("weight_scale_2", "weight_scale_inv") and owner is not None and _is_complete(view, owner)
        if suffix in ("_amax", "_extra_state") or is_scale:
            dropped = Edits(dropped=frozenset({(stored.file.path.name, name)}))
            yield Change(name, "is removed: it is no tensor of the format, and what it says is in the scales", dropped)
        elif is_quantizer_state(name) or suffix in ("weight_g_idx", "pre_quant_scale", "output_scale"):
            yield Refusal(name, "is no tensor of the format, and may change what the layer computes: quantize again")
    for each in view.quantized:
        planned = view.planned(each)
        if planned and _ZERO_POINT in each.tensors.keys() - planned.keys():
            yield Refusal(f"{each.name}.{_ZERO_POINT}", "lies beside symmetric codes: the format has no place for it")


_RENAMED = {
    "weight_scale_inv": "weight_scale",  # DeepSeek's name, for the same multiplier
    "k_proj.output_scale": "k_scale",  # names of the cache's scales in older compressed-tensors
    "v_proj.output_scale": "v_scale",
    "k_cache_scale": "k_scale",
    "v_cache_scale": "v_scale",
}


def _names(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    """Tensors of the format under another name, where the right one is missing and dtype and shape fit."""
    for name, stored in view.tensors.items():
        old = next((each for each in _RENAMED if name.endswith(f".{each}")), None)
        if old is None:
            continue
        right = name.removesuffix(old) + _RENAMED[old]
        owner = view.modules.get(right.rpartition(".")[0])
        planned = {} if owner is None else view.planned(owner)
        fits = stored.spec in planned.get(_RENAMED[old], ()) if old == "weight_scale_inv" else _is_cache_scale(stored)
        if right not in view.tensors and fits:
            edits = Edits(tensors={right: stored}, dropped=frozenset({(stored.file.path.name, name)}))
            yield Change(name, f"is called {right.rpartition('.')[2]}", edits)


def _is_cache_scale(stored: StoredTensor) -> bool:
    return stored.spec in (TensorSpec((1,), torch.float32), TensorSpec((), torch.float32))


def _is_complete(view: MendedView, module: Module) -> bool:
    planned = view.planned(module)
    return bool(planned) and planned.keys() <= module.tensors.keys()


def _contract(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    """Tensors with the right bytes under another dtype or shape, and numbers in another float dtype."""
    for module in view.quantized:
        for suffix, allowed in view.planned(module).items():
            stored = module.tensors.get(suffix)
            if stored is None or stored.spec in allowed:
                continue
            name = f"{module.name}.{suffix}"
            right = next((spec for spec in allowed if _holds_the_same(stored, spec)), None)
            if right is not None:
                becomes = StoredTensor(stored.file, stored.begin, right)
                yield Change(name, f"{stored.spec} → {right}, the same bytes", Edits(tensors={name: becomes}))
            elif (number := _number(stored, allowed)) is not None:
                spec = TensorSpec.of(number)
                yield Change(
                    name,
                    f"{stored.spec} → {spec}, the same value",
                    Edits(tensors={name: Given.of(stored.file, number)}),
                )
            else:
                yield Refusal(name, f"is {stored.spec}, must be {' or '.join(sorted(map(str, allowed)))}")


def _holds_the_same(stored: StoredTensor, right: TensorSpec) -> bool:
    """True if the bytes are those of a tensor of another dtype of one byte, or of the same numbers in another shape.

    Bytes that stand for E4M3 scales are positive numbers. E8M0 exponents may be any bytes but NaN's.
    """
    spec = stored.spec
    if spec.nbytes != right.nbytes:
        return False
    if spec.dtype == right.dtype:  # [], [1] and [1, 1]; [out] and [out, 1]
        return [side for side in spec.shape if side != 1] == [side for side in right.shape if side != 1]
    if spec.shape != right.shape or {spec.dtype, right.dtype} > {torch.uint8, *_SCALES}:
        return False
    if spec.dtype == torch.uint8 and right.dtype == torch.float8_e4m3fn:
        return all(bool(((rows > 0) & (rows < 0x7F)).all()) for _, rows in stored.parts())
    return spec.dtype == torch.float8_e8m0fnu and right.dtype == torch.uint8


_SCALES = (torch.float8_e4m3fn, torch.float8_e8m0fnu)


def _number(stored: StoredTensor, allowed: frozenset[TensorSpec]) -> torch.Tensor | None:
    """A single number in fp32, if the format has one there and fp32 holds its value exactly."""
    wanted = next((spec for spec in allowed if spec.dtype == torch.float32 and spec.nbytes == 4), None)
    if wanted is None or stored.spec.dtype not in _FLOATS or stored.spec.nbytes != stored.spec.dtype.itemsize:
        return None
    value = stored.read().reshape(wanted.shape)
    return value.float() if bool(value.float().to(value.dtype) == value) else None


def _shapes(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    for module in view.quantized:
        stored = module.tensors.get("weight_shape")
        if stored is None or stored.spec != TensorSpec((2,), torch.int64) or module.shape is None:
            continue
        found = tuple(stored.read().tolist())
        if found == module.shape:
            continue
        name = f"{module.name}.weight_shape"
        if module.scheme is None or module.scheme.blocks.width is None or not _is_complete(view, module):
            yield Refusal(name, f"says {list(found)}; whole rows of codes may end within a word, so only it says where")
        else:
            right = Given.of(stored.file, torch.tensor(module.shape))
            yield Change(
                name, f"{list(found)} → {list(module.shape)}, of the codes and scales", Edits(tensors={name: right})
            )


def _index(view: MendedView, unseen: Unseen) -> Iterator[Found]:
    """The index, made anew from the headers where it is not theirs."""
    held = {name: place.file for name, place in view.places}
    stated, total = view.weight_map, sum(place.stored.spec.nbytes for _, place in view.places)
    if view.broken or not held:
        return  # what a file holds is not known
    metadata, has_index = (view.index or {}).get("metadata") or {}, INDEX_FILE in view.opened.names
    in_step = stated == held and metadata.get("total_size") == total
    if in_step or (not has_index and len(view.files) == 1):
        return
    if view.index is None and (gone := _gone(view.opened.files)):
        yield Refusal(INDEX_FILE, f"cannot be written: by the names of the others, {gone} is gone with its tensors")
        return
    lost = {name: file for name, file in stated.items() if name not in held}
    missing = {name: file for name, file in lost.items() if not _is_stale(view, name)}
    for name, file in missing.items():
        where = "which does not hold it" if file in view.files else "which is not there"
        yield Refusal(name, f"the index says {file}, {where}, and no other file has it: its weights are gone")
    if missing:
        return
    index = {
        **(view.index or {}),
        "metadata": {**metadata, "total_size": total},
        "weight_map": {name: held[name] for name in sorted(held, key=natural_key)},
    }
    edits = Edits(index=index)
    if view.index is None:
        yield Change(INDEX_FILE, f"written from the headers of {len(view.files)} files", edits)
    for name in lost:
        yield Change(name, f"leaves the index: {_why_stale(view, name)}", edits)
    for name, file in held.items() if view.index is not None else ():
        if stated.get(name) != file:
            what = f"the index says {stated[name]}" if name in stated else "is not in the index"
            yield Change(name, f"{what}: it is in {file}", edits)
    if view.index is not None and metadata.get("total_size") != total:
        yield Change(INDEX_FILE, f"total_size {metadata.get('total_size')} → {total}", edits)


def _gone(files: Iterable[str]) -> str | None:
    """The first file that is missing among files that say their number and how many they are; None if none is."""
    found = [match for file in files if (match := _SHARD.fullmatch(file)) is not None]
    numbers = {(match[1], match[3]): {int(other[2]) for other in found if other[1] == match[1]} for match in found}
    for (stem, count), there in numbers.items():
        for number in range(1, min(int(count), _MOST_FILES) + 1):
            if number not in there:
                return f"{stem}-{number:0{len(count)}d}-of-{count}.safetensors"
    return None


def _is_stale(view: MendedView, name: str) -> bool:
    return bool(_why_stale(view, name))


def _why_stale(view: MendedView, name: str) -> str:
    """Why an entry of the index names nothing that the model lacks; "" if it may."""
    module, _, suffix = name.rpartition(".")
    owner, known = view.modules.get(module), architecture_of(view.config)
    if any(file_name == name for _, file_name in view.edits.dropped):
        return "it was removed"
    if suffix == "weight" and owner is not None and owner.is_quantized and _is_complete(view, owner):
        return "the weight is quantized"
    if owner is not None and owner.is_quantized and suffix in QUANTIZED_SUFFIXES:
        return ""
    if (
        known is not None
        and known.fact(name) is None
        and (suffix not in QUANTIZED_SUFFIXES or known.fact(f"{module}.weight") is None)
    ):
        return f"{known.name} has no such tensor"
    return ""


FIRST = (
    Mend(
        "duplicates",
        ("duplicates",),
        "a tensor is in two files",
        "the one that the index names stays; without an index, one of two with the same bytes; otherwise refused",
        _duplicates,
    ),
)
SPECS = (
    Mend(
        "names",
        ("leftovers", "suffixes", "kv-scales"),
        "a tensor of the format has another name: weight_scale_inv, k_proj.output_scale, k_cache_scale",
        "it gets its name, if the right one is missing and dtype and shape fit",
        _names,
    ),
    Mend(
        "leftovers",
        ("leftovers",),
        "buffers of quantizers, or scales of another format, lie beside complete modules",
        "they are removed; what may change a layer (pre_quant_scale, zero points, a column order) is refused",
        _leftovers,
    ),
    Mend(
        "dtypes-and-shapes",
        ("contract",),
        "a tensor has another dtype or shape than its format",
        "the same bytes or the same number are written as the format has them; otherwise refused",
        _contract,
    ),
    Mend(
        "weight-shape",
        ("weight-shape",),
        "weight_shape is not the shape of the codes",
        "that of codes and scales is written; refused where whole rows share a scale: nothing else says where they end",
        _shapes,
    ),
)
LAST = (
    Mend(
        "index",
        ("index", "total-size"),
        "the index and the headers disagree, or total_size is not theirs",
        "the index is written from the headers; an entry that no file holds leaves it if the weight is quantized or "
        "the architecture has no such tensor; otherwise refused",
        _index,
    ),
)
