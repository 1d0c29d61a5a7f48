"""The files beside the tensors: config.json with its `quantization_config`, the index, and what is carried over."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from amaxbridge.export.amax.cache_scales import CacheFormat
from amaxbridge.export.architectures.engines import fused_layer_names, ungated_names
from amaxbridge.export.disk.atomic_move import raise_it
from amaxbridge.export.disk.input_files import parts_of, read_input
from amaxbridge.export.disk.input_paths import leaves
from amaxbridge.export.disk.io_errors import explaining_reads
from amaxbridge.export.disk.output_place import INSIDE
from amaxbridge.export.disk.shard_layout import SINGLE_FILE, Layout
from amaxbridge.export.disk.strict_json import read_json_object
from amaxbridge.export.output.provenance import RECORD_FILE
from amaxbridge.export.quantization_declared import FILES_OF_QUANTIZATION, without_declarations
from amaxbridge.export.schemes.scheme import Scheme
from amaxbridge.mappings.config_fields import check_all_fields
from amaxbridge.mappings.errors import CheckpointError, UsageError, listing
from amaxbridge.mappings.fused_groups import groups_among
from amaxbridge.mappings.names import split_at_numbers

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
QUANT_STATE_FILE = "quant_state.safetensors"
CARD_FILE = "README.md"

_WEIGHT_SUFFIXES = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".nemo", ".gguf",
    ".onnx", ".onnx_data", ".h5", ".msgpack",
)  # fmt: skip
_WRITTEN_ANEW = (
    CONFIG_FILE, CARD_FILE, RECORD_FILE, "report.html", "report.json",
    *FILES_OF_QUANTIZATION,
    INSIDE,  # the name of a staging directory
)  # fmt: skip


_log = logging.getLogger("amaxbridge")


def read_config_json(directory: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face directory.

    Raises:
        UsageError: there is none, it is not an object in strict JSON, or fields have values that no model has.
    """
    file = directory / CONFIG_FILE
    config = read_json_object(file)
    if config is None:
        raise UsageError(f"{directory} is not a Hugging Face model directory: no {CONFIG_FILE} there")
    check_all_fields(config, file)
    return config


def config_json(hf_config: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> bytes:
    """config.json of the output: the source's without its own quantization, at any depth, and with this one."""
    config = without_declarations(hf_config)
    if quantization is not None:
        config["quantization_config"] = quantization
    return json_bytes(config)


def quantization_config(
    schemes: Mapping[str, Scheme],
    ignore: Sequence[str],
    *,
    cache: CacheFormat | None = None,
    other_names: Callable[[str], Iterable[str]] = lambda module: (),
) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors.

    It has only keys that all engines accept, and groups `group_0`, `group_1`, … with a format each. A single scheme
    targets the class `Linear`; several name their modules, because engines must not find both kinds of targets. Names
    of the layers that engines make of fused groups stand beside those of their members: SGLang asks for `qkv_proj`, and
    of many architectures it does not know the members.

    Args:
        schemes: quantized module → its scheme.
        ignore: the unquantized linear modules.
        cache: how the key-value cache is quantized, if the layers have `k_scale` and `v_scale`.
        other_names: what engines and transformers call a module of the files where it is not what the files call it.
    """
    members: dict[str, list[str]] = {}
    for module, scheme in schemes.items():
        members.setdefault(json.dumps(scheme.config_group), []).append(module)
    groups = [json.loads(group) for group in members]
    for group, modules in zip(groups, members.values(), strict=True):
        others = (schemes.keys() - set(modules)) | set(ignore)
        alone = len(groups) == 1 and "lm_head" not in schemes
        group["targets"] = ["Linear"] if alone else patterns_of(modules, others, other_names)
        group["output_activations"] = None
    formats = {group["format"] for group in groups}
    config = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": [*ignore, *fused_layers(ignore)],
    }
    return config | ({"kv_cache_scheme": dict(cache.config)} if cache else {})


def patterns_of(
    modules: Collection[str], others: Iterable[str], other_names: Callable[[str], Iterable[str]] = lambda module: ()
) -> list[str]:
    """Targets for exactly these modules: patterns over numbers, or over one where a pattern would match others.

    Args:
        other_names: further names of a module, which are targets, too.
    """
    taken = {tuple(split_at_numbers(name)[::2]) for other in others for name in (other, *other_names(other))}
    targets: dict[str, None] = {}
    known = set(modules)
    for module in (name for each in modules for name in (each, *other_names(each))):
        fused = (*fused_layer_names(module), *ungated_names(module, known))
        between = tuple(split_at_numbers(module)[::2])
        if not fused and between in taken:
            targets[module] = None
            continue
        parts = [module] if between in taken else between
        *before, last = map(re.escape, parts)
        if fused:
            parent, dot, leaf = last.rpartition(re.escape("."))
            last = f"{parent}{dot}({'|'.join((leaf, *fused))})"
        targets["re:" + r"\d+".join([*before, last]) + "$"] = None
    return list(targets)


def fused_layers(modules: Iterable[str]) -> list[str]:
    """The names of the layers that engines make of the fused groups among these modules."""
    groups = groups_among(module for module in modules if not module.startswith("re:"))
    fused = [
        f"{group.primary.rpartition('.')[0]}.{name}"
        for group in groups
        if len(group.members) > 1
        for name in fused_layer_names(group.primary)
    ]
    known = {module for group in groups for module in group.members}
    ungated = [
        f"{module.rpartition('.')[0]}.{name}"
        for group in groups
        for module in group.members
        if ".experts.0." in module
        for name in ungated_names(module, known)
    ]
    return [*fused, *ungated]


def index_json(layout: Layout, *, alone: bool = True) -> bytes | None:
    """The safetensors index, or None for the single file that needs none.

    Args:
        layout: the shards.
        alone: True if no other safetensors file lies beside the shards. Without an index, vLLM and SGLang load all.
    """
    if alone and [shard.file_name for shard in layout.shards] == [SINGLE_FILE]:
        return None
    return json_bytes({"metadata": {"total_size": layout.total_size}, "weight_map": layout.weight_map})


@dataclass(frozen=True, slots=True)
class Companions:
    """The files of a Hugging Face directory beside its weights, sorted out once.

    Carried over unchanged are tokenizer, chat templates, remote code, generation config, licence and images of the
    card; also directories, except hidden ones and those with weights of their own (`original/`, `onnx/`), which hold
    the model again. Links out of the directory, or in a circle, are never followed.

    Args:
        source: the directory; None where there is none.
        files: what is carried over: path in the output → file.
        weights: paths of all safetensors files, also in directories that are not carried over.
        left: the directories that are not carried over because they hold weights.
        leaving: the links that lead out of the directory, or in a circle.
    """

    source: Path | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    weights: Sequence[str] = ()
    left: Sequence[str] = ()
    leaving: Sequence[Path] = ()

    @classmethod
    def of(cls, source: Path | None) -> Self:
        """Sorts out what is in `source` now."""
        if source is None or not source.is_dir():  # a configuration may be in memory alone
            return cls()
        with explaining_reads(source):
            found, leaving = _walk(source)
        weights = [name for name in found if name.endswith(".safetensors")]
        left = sorted({name.split("/")[0] for name in found if "/" in name and name.endswith(_WEIGHT_SUFFIXES)})
        files = {name: file for name, file in found.items() if name.split("/")[0] not in left and _is_carried(name)}
        return cls(source, files, weights, left, leaving)

    @classmethod
    def all_of(cls, source: Path) -> Self:
        """Everything in a checkpoint but its tensor files, for an output that differs from it in few of them.

        Only links that lead out of the directory, and hidden directories, are left behind.
        """
        with explaining_reads(source):
            found, leaving = _walk(source)
        weights = [name for name in found if is_tensor_file(name)]
        return cls(source, {name: file for name, file in found.items() if name not in weights}, weights, (), leaving)

    @property
    def card(self) -> str:
        """The model card; empty if there is none, or if it is a link to a file outside."""
        card = None if self.source is None else self.source / CARD_FILE
        if card is None or self.source is None or card in self.leaving:
            return ""
        return (read_input(card, self.source) or b"").decode(errors="replace")

    @property
    def read(self) -> list[str]:
        """The files of the directory that decide an output, weights not included; some may not be there."""
        source = self.source
        if source is None:
            return []
        names = (CONFIG_FILE, INDEX_FILE, CARD_FILE, *FILES_OF_QUANTIZATION)
        return [*self.files, *(name for name in names if source / name not in self.leaving)]

    @property
    def nbytes(self) -> int:
        """The size of everything that is carried over."""
        total = 0
        for file in self.files.values():
            with explaining_reads(file):
                total += file.stat().st_size
        return total

    def contents(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """The files that are carried over, one by one: path in the output, content in parts.

        Raises:
            CheckpointError: a file cannot be read.
        """
        for name, file in self.files.items():
            yield name, parts_of(file, self.source)

    def warn(self) -> None:
        """Names what is not carried over."""
        if self.leaving:
            leaving = [f"{file} → {os.path.realpath(file)}" for file in self.leaving]
            _log.warning("%s: links to files outside of it are not carried over:%s", self.source, listing(leaving))
        if self.left:
            _log.warning(
                "%s: directories with weights of their own are not carried over:%s", self.source, listing(self.left)
            )

    def fingerprint(self, plan: str, config: Mapping[str, Any]) -> str:
        """A hash of everything that an output is made from: the plan, config.json and these files."""
        digest = hashlib.sha256(plan.encode() + json.dumps(config, sort_keys=True).encode())
        for name, parts in (*self.contents(), (CARD_FILE, iter([self.card.encode()]))):
            of_file = hashlib.sha256()
            for part in parts:
                of_file.update(part)
            digest.update(os.fsencode(name) + f" {of_file.hexdigest()}\n".encode())
        return digest.hexdigest()


def is_tensor_file(name: str) -> bool:
    """True for a file of a checkpoint's tensors; quantizer state may lie beside them and is no part of it."""
    return "/" not in name and name.endswith(".safetensors") and name != QUANT_STATE_FILE


def _walk(source: Path) -> tuple[dict[str, Path], list[Path]]:
    """The files of a directory by their paths in it, without hidden directories and caches; the links that lead out."""
    found: dict[str, Path] = {}
    leaving: list[Path] = []
    entered = {source.resolve()}  # through links: each directory once, because links may lead in a circle
    for path, directories, files in os.walk(source, followlinks=True, onerror=raise_it):
        here = Path(path)
        inside = []
        for name in sorted([*directories, *files]):
            file = here / name
            if file.is_symlink() and _leads_astray(file, source):
                leaving.append(file)
            elif file.is_file():
                found[file.relative_to(source).as_posix()] = file
            elif name in directories and not _is_passed_over(file, source) and file.resolve() not in entered:
                entered.add(file.resolve())
                inside.append(name)
        directories[:] = inside
    return found, leaving


def _leads_astray(link: Path, source: Path) -> bool:
    """True if a link leads out of the directory, or in a circle."""
    try:
        return leaves(link, source)
    except CheckpointError:
        return True


def _is_passed_over(directory: Path, source: Path) -> bool:
    hidden = directory.parent == source and directory.name.startswith((".", "__"))
    return hidden or directory.name == "__pycache__"


def _is_carried(name: str) -> bool:
    return "/" in name or (name not in _WRITTEN_ANEW and not name.endswith(_WEIGHT_SUFFIXES))


def json_bytes(content: object) -> bytes:
    """Returns JSON in the form of a checkpoint's files."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
