"""Rules about files: headers, the index, their agreement."""

from collections.abc import Iterator
from fnmatch import fnmatchcase

from amaxbridge.export.output.config_and_index import CONFIG_FILE, INDEX_FILE
from amaxbridge.export.verify.checkpoint_view import CheckpointView
from amaxbridge.export.verify.finding import Problem, Rule, Severity

_TOKENIZERS = ("tokenizer*", "vocab.*", "*.tiktoken", "spiece.model", "tekken.json")


def _headers(view: CheckpointView) -> Iterator[Problem]:
    for file, what in view.broken.items():
        yield Problem(file, what)
    if not view.files and not view.broken:
        yield Problem(str(view.directory), "has no safetensors files")


def _index(view: CheckpointView) -> Iterator[Problem]:
    if INDEX_FILE not in view.names:
        if len(view.files) + len(view.broken) > 1:
            yield Problem(INDEX_FILE, f"is not there, for {len(view.files) + len(view.broken)} files")
    elif view.index is None or not isinstance(view.index.get("weight_map"), dict):
        yield Problem(INDEX_FILE, view.index_problem or "has no weight_map")
    else:
        held = {(name, place.file) for name, place in view.places}
        for name, file in view.weight_map.items():
            if file in view.files:
                if (name, file) not in held:
                    yield Problem(name, f"the index says {file}, which does not hold it")
            elif file not in view.broken:
                yield Problem(file, f"the index names it for {name}, and it is not there")
        for name, place in view.places:
            if name not in view.weight_map:
                yield Problem(name, f"in {place.file}, and not in the index")


def _duplicates(view: CheckpointView) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for name, place in view.places:
        if first.setdefault(name, place.file) != place.file:
            yield Problem(name, f"in {first[name]} and in {place.file}")


def _total_size(view: CheckpointView) -> Iterator[Problem]:
    metadata = (view.index or {}).get("metadata") or {}
    found = sum(place.stored.spec.nbytes for _, place in view.places)
    if view.index is not None and not view.broken and metadata.get("total_size") != found:
        yield Problem(INDEX_FILE, f"total_size is {metadata.get('total_size')}, the tensors have {found} bytes")


def _config(view: CheckpointView) -> Iterator[Problem]:
    if view.config_problem is not None:
        yield Problem(CONFIG_FILE, view.config_problem)


def _tokenizer(view: CheckpointView) -> Iterator[Problem]:
    if not any(fnmatchcase(name, pattern) for pattern in _TOKENIZERS for name in view.names):
        yield Problem("tokenizer", f"has none of {', '.join(_TOKENIZERS)}")


_AGAIN = "Export again, or copy the file again"

RULES = (
    Rule(
        "headers",
        "every file is whole and its header says where each tensor lies: no gaps, no overlaps",
        "does not load, or loads bytes of another tensor",
        _AGAIN,
        _headers,
    ),
    Rule(
        "index",
        "the index and the headers name the same tensors in the same files",
        "a tensor that is only in a header may never be loaded; one that is only in the index stops the load",
        "Write the index again from the headers, or remove files that do not belong to the checkpoint",
        _index,
    ),
    Rule(
        "duplicates",
        "no tensor is in two files",
        "which one is loaded depends on the order of the files",
        "Remove the file that does not belong to the checkpoint",
        _duplicates,
    ),
    Rule(
        "total-size",
        "total_size of the index is the number of bytes of all tensors",
        "memory is planned, and downloads are checked, by a wrong number",
        "Write the index again from the headers",
        _total_size,
    ),
    Rule(
        "tokenizer",
        "a tokenizer lies beside the weights",
        "engines stop before the weights are loaded, unless they are given another tokenizer",
        "Copy the tokenizer's files from the model that this was made from",
        _tokenizer,
        Severity.NOTE,
    ),
    Rule("config", "config.json is there and is a JSON object", "does not load", _AGAIN, _config),
)
