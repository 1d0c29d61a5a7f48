"""The model card, and the same facts as JSON: what was made from which model, by which command, with which result.

The card's metadata is the source's, adapted to the output: `base_model` names the source, evaluation results are left
out (they are not of these weights), licence and languages stay. Our section comes first. The source's text follows
unchanged,
because users of the output need it: terms, prompts, citation.

`amaxbridge.json` is for programs, such as `export/report`; it also records how the export was asked for. The card holds
no date, no host and no full path, so the same export writes the same card, and it can be published.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, RepoCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from amaxbridge.export.amax.quant_state import QuantState
from amaxbridge.export.disk.atomic_move import replace_file
from amaxbridge.export.disk.input_files import read_input
from amaxbridge.export.disk.shard_layout import Layout
from amaxbridge.export.disk.staging import Content
from amaxbridge.export.disk.strict_json import misfit
from amaxbridge.export.hub import hub_name
from amaxbridge.export.modelopt_config import HF_QUANT_CONFIG_FILE
from amaxbridge.export.output.config_and_index import (
    CARD_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    Companions,
    config_json,
    index_json,
    json_bytes,
)
from amaxbridge.export.output.finalizer import Finalizer
from amaxbridge.export.output.module_schemes import unquantized_kinds
from amaxbridge.export.output.provenance import RECORD_FILE, read_record, versions
from amaxbridge.export.schemes import COMPRESSED_TENSORS
from amaxbridge.export.verify.reference_weights import ErrorSummary, WeightError
from amaxbridge.mappings.errors import UsageError
from amaxbridge.mappings.names import kind_of

_log = logging.getLogger("amaxbridge")
_NOT_OF_THE_OUTPUT = ("base_model", "base_model_relation", "model-index", "new_version", "quantized_by")
_BEGIN, _END = "<!-- amaxbridge -->", "<!-- /amaxbridge -->"
_SHOWN = ("scheme", "formats", "kv_cache", "bytes", "quantized", "ignored", "amax", "versions")  # facts of every card


@dataclass(frozen=True, slots=True)
class Conversion:
    """What an export notes down of itself.

    Args:
        finalizer: what became of each module.
        layout: the files of weights.
        source_bytes: of all weights before.
        state: what training calibrated.
        base_model: the source's name on the Hub; None for the one that its place in the Hub's cache tells.
        record: how it was asked for; its `command_line` and its `notes` to users are shown in the card.
    """

    finalizer: Finalizer = field(repr=False)
    layout: Layout = field(repr=False)
    source_bytes: int
    state: QuantState = field(default_factory=QuantState, repr=False)
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    base_model: str | None = None


def files_beside(
    companions: Companions, config: Mapping[str, Any], conversion: Conversion, *, alone: bool = True
) -> Iterator[tuple[str, Content]]:
    """Every file of an output but the weights: the companions, config.json made from `config`, the index if needed.

    Args:
        alone: as in `index_json`.
    """
    yield from companion_files(companions, conversion)
    yield CONFIG_FILE, config_json(config, conversion.finalizer.quantization_config)
    if (said := conversion.finalizer.hf_quant_config) is not None:
        yield HF_QUANT_CONFIG_FILE, json_bytes(said)
    index = index_json(conversion.layout, alone=alone)
    if index is not None:
        yield INDEX_FILE, index


def companion_files(companions: Companions, conversion: Conversion) -> Iterator[tuple[str, Content]]:
    """All small files of an output but config.json and the index: path in the output, content.

    Args:
        companions: what goes along from the source.
    """
    companions.warn()
    yield from companions.contents()
    facts = {**conversion.record, **_facts(companions.source, conversion), "versions": versions()}
    yield RECORD_FILE, json_bytes(facts)
    yield CARD_FILE, model_card(companions.card, facts).encode()


def model_card(original: str, facts: Mapping[str, Any]) -> str:
    """README.md.

    Args:
        original: that of the source, "" for none.
        facts: as in `amaxbridge.json`.
    """
    metadata, text = _parsed(original)
    return "\n".join(
        ["---", _front_matter(metadata, facts), "---", "", _section(facts), _without_ours(text).strip(), ""]
    )


def note_snr(directory: Path, errors: Sequence[WeightError]) -> None:
    """Notes what was measured in an output's `amaxbridge.json`, and writes our section of its card anew.

    Args:
        errors: of the quantized weights, against the source.

    Raises:
        UsageError: no such file: the directory was not made here; or nothing was measured.
    """
    record, card = directory / RECORD_FILE, directory / CARD_FILE
    inexact = [each for each in errors if math.isfinite(each.snr)]
    found_record = read_record(directory)
    if found_record is None or not inexact:
        why = f"no {RECORD_FILE} there" if inexact else "no weight could be measured"
        raise UsageError(f"{directory}: {why}, so its card stays as it is; leave card= out")
    found = ErrorSummary.of(inexact)
    measured = {"mean": found.mean_snr, "lowest": found.worst.snr, "lowest_module": found.worst.module}
    noted = {"base_model": None, **found_record}
    if lacking := [key for key in _SHOWN if noted.get(key) is None]:
        raise UsageError(f"{record} lacks {', '.join(lacking)}, so the card stays as it is; leave card= out")
    facts = {**noted, "snr": measured}
    text = (read_input(card, directory) or b"").decode(errors="replace")
    replace_file(record, json_bytes(facts))
    replace_file(card, model_card(text, facts).encode())


def _without_ours(text: str) -> str:
    """A card without the sections that were written here before."""
    kept = []
    while (begin := text.find(_BEGIN)) >= 0 and (end := text.find(_END, begin)) >= 0:
        kept.append(text[:begin])
        text = text[end + len(_END) :].lstrip()
    return "".join([*kept, text])


def _facts(source: Path | None, conversion: Conversion) -> dict[str, Any]:
    finalizer, layout, state = conversion.finalizer, conversion.layout, conversion.state
    return {
        "base_model": conversion.base_model or hub_name(source),
        "scheme": "+".join(sorted(set(finalizer.scheme_names.values()))) or "none",
        "formats": _formats(finalizer),
        "format": finalizer.format,
        "kv_cache": finalizer.cache.words if finalizer.cache and finalizer.quantized else "",
        "bytes": {"before": conversion.source_bytes, "after": layout.total_size},
        "tensors": sum(len(shard.specs) for shard in layout.shards),
        "files": len(layout.shards),
        "quantized": len(finalizer.quantized),
        "data_free": finalizer.data_free,
        "ignored": list(dict.fromkeys(kind_of(module) for module in finalizer.ignore)),
        "unquantized": unquantized_kinds(
            {name: spec for shard in layout.shards for name, spec in shard.specs.items()}, {*finalizer.quantized}
        ),
        **({"mixed_groups": list(dict.fromkeys(map(kind_of, finalizer.unified)))} if finalizer.unified else {}),
        "amax": {
            "collected": len(state.amax),
            "missing": sorted(state.missing),
            "filled": dict(finalizer.filled),
            "divergent": {name: list(values) for name, values in state.divergent.items()},
        },
    }


def _formats(finalizer: Finalizer) -> list[str]:
    """The formats of the config's groups, or ModelOpt's algorithms."""
    return list(dict.fromkeys(scheme.stored_as for scheme in finalizer.written.values()))


def _parsed(original: str) -> tuple[CardData, str]:
    """Metadata and text. A block that the Hub would refuse goes away with a warning."""
    found = REGEX_YAML_BLOCK.match(original)
    if found is None:
        return CardData(), original
    try:
        card = RepoCard(original)
        card.data.to_yaml()
        if wrong := misfit(card.data.get("tags"), (str, [str], None), "tags"):
            raise ValueError(wrong)
    except Exception:  # a stranger's YAML makes the library raise anything
        _log.warning("the metadata of the source's %s is no YAML mapping, and is left out: set the licence", CARD_FILE)
        return CardData(), original[found.end() :]
    return card.data, card.text


def _front_matter(original: CardData, facts: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in vars(original).items() if key not in _NOT_OF_THE_OUTPUT}
    tags = kept.pop("tags", None) or []
    tags = [tags] if isinstance(tags, str) else tags
    ours = ["amaxbridge", *([_format(facts), facts["scheme"]] if facts["quantized"] else [])]
    if facts["base_model"]:
        kept |= {"base_model": facts["base_model"]}
        kept |= {"base_model_relation": "quantized" if facts["quantized"] else "finetune"}
    kept = {"library_name": "transformers", **kept, "tags": list(dict.fromkeys([*tags, *ours]))}
    return CardData(**kept).to_yaml()


def _section(facts: Mapping[str, Any]) -> str:
    name = facts["base_model"] or "a model"
    what = f"quantized to {facts['scheme']}" if facts["quantized"] else "exported"
    before, after, amax = facts["bytes"]["before"], facts["bytes"]["after"], facts["amax"]
    rows = {
        "scheme": facts["scheme"] + (f" ({', '.join(facts['formats'])})" if facts["formats"] else ""),
        "key-value cache": "FP8" if facts["kv_cache"] is True else facts["kv_cache"],  # of older records: True
        "size": f"{size_text(after)}, before {size_text(before)}" + (f" ({after / before:.0%})" if before else ""),
        "modules quantized": f"{facts['quantized']:,}",
        "unquantized": ", ".join(_counted(f"`{kind}`", count) for kind, count in _unquantized(facts).items()),
        "in 16 bits because their fused groups have several formats": ", ".join(
            f"`{module}`" for module in facts.get("mixed_groups") or ()
        ),
        "amax from training": f"{amax['collected']:,}" if amax["collected"] else "none, quantized without data",
        "amax that differed between ranks": f"{len(amax['divergent']):,}" if amax["divergent"] else "",
        "amax that were missing": f"{len(amax['filled']):,}, filled" if amax["filled"] else "",
        "signal to noise of the weights": _snr(facts["snr"]) if "snr" in facts else "",
        "made with": ", ".join(f"{package} {number}" for package, number in facts["versions"].items()),
    }
    if not facts["quantized"]:
        rows = {key: rows[key] for key in ("size", "made with")}
    serve = ["", "```sh", "vllm serve PATH_OF_THIS_DIRECTORY", "```"] if facts["quantized"] else []
    command = ["", "```sh", facts["command_line"], "```"] if facts.get("command_line") else []
    notes = ["", *(f"- {note}" for note in facts["notes"])] if facts.get("notes") else []
    table = ["", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items() if value)]
    head = f"# {name.rpartition('/')[2]}, {facts['scheme']}" if facts["base_model"] else f"# {what.capitalize()}"
    linked = f"[{name}](https://huggingface.co/{name})" if facts["base_model"] else name
    sentence = f"{linked}, {what} by amaxbridge{f', in the {_format(facts)} format' if facts['quantized'] else ''}."
    said = [sentence[0].upper() + sentence[1:], *notes]
    return "\n".join([_BEGIN, head, "", *said, *table, *serve, *command, "", _END, ""])


def _format(facts: Mapping[str, Any]) -> str:
    return str(facts.get("format", COMPRESSED_TENSORS))


def _unquantized(facts: Mapping[str, Any]) -> Mapping[str, int]:
    """Kinds of unquantized matrices and how many there are; older records have the kinds alone."""
    return facts.get("unquantized") or dict.fromkeys(facts["ignored"], 1)


def _counted(name: str, count: int) -> str:
    return name if count == 1 else f"{name} ({count:,})"


def _snr(measured: Mapping[str, Any]) -> str:
    return f"{measured['mean']:.1f} dB, the lowest {measured['lowest']:.1f} dB in `{measured['lowest_module']}`"


def size_text(count: float) -> str:
    """A number of bytes for people: `1.23 GB`."""
    for unit, least in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= least:
            return f"{count / least:.3g} {unit}"
    return f"{count:.0f} bytes"
