"""Makes the table of architectures from transformers' models: one JSON file for each in `export/architectures/known`.

    python -m tests.architectures.generate [--check] [ARCHITECTURE …]

`--check` writes nothing, and fails if a file differs from what would be written.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from amaxbridge.export.architectures.facts import KNOWN, pattern_of
from tests.architectures.derive import TensorFact, derive, tensors
from tests.architectures.models import architectures, build, config_of, resized, text_config_of, variants
from tests.architectures.sizes import LARGER, count, expressions


def known(architecture: str) -> dict[str, Any]:
    """What is known of an architecture, as in its file.

    Args:
        architecture: a class of transformers, and after a dot a model type if it is not the class's own.
    """
    facts: dict[str, TensorFact] = {}
    configs: dict[str, Mapping[str, Any]] = {}
    seen: list[dict[str, tuple[int, ...]]] = []
    for name, model in variants(architecture):
        if (found := tensors(model)) in seen:
            continue
        seen.append(found)
        derive(model, name, facts)
        configs[name] = text_config_of(model.config).to_dict()
    for number, larger in enumerate(resized(architecture)):
        derive(larger, f"{LARGER}{number}", facts)
        configs[f"{LARGER}{number}"] = text_config_of(larger.config).to_dict()
    model = build(architecture, config_of(architecture))
    entry: dict[str, Any] = {"model_type": model.config.model_type, "base": model.base_model_prefix}
    if (part := _text_part(model.config)) is not None:
        entry["text_config"] = part
    entry["output"] = _heads(model)
    if unused := sorted(model._keys_to_ignore_on_load_unexpected or ()):
        entry["unused"] = unused
    if twins := _twins(model):
        entry["twins"] = twins
    towers = _prefixes(facts)
    entry["towers"] = {prefix: _tower(prefix, facts) for prefix in towers}
    for pattern, fact in sorted(facts.items()):
        if not (fact.role == "tower" and pattern.startswith(tuple(towers))):
            entry.setdefault(fact.role, {})[pattern] = _described(pattern, fact, configs)
    return entry


def _text_part(config: PreTrainedConfig) -> str | None:
    text = text_config_of(config)
    return next((key for key, value in vars(config).items() if value is text and value is not config), None)


def _heads(model: PreTrainedModel) -> dict[str, Any]:
    """The output layers' modules, and True if the first is the embedding where the configuration does not say so.

    A model inside a model ties its own head, by its own configuration.
    """
    parts = {name: each for name, each in model.named_modules() if isinstance(each, PreTrainedModel)}
    outputs = [output for each in parts.values() if (output := each.get_output_embeddings()) is not None]
    names = {name: each for name, each in model.named_modules() if any(each is output for output in outputs)}
    first = next((name for name, each in names.items() if each is outputs[0]), None)
    inner = [name for name, each in names.items() if name != first and isinstance(each, nn.Linear)]
    found: dict[str, Any] = {"module": first, **({"inner": inner} if inner else {})}
    for name, owner in parts.items():
        if f"{first}.weight" in {f"{name}.{key}".removeprefix(".") for key in owner._tied_weights_keys or ()}:
            tied = bool(getattr(owner.config, "tie_word_embeddings", False))
            nested = {"nested": True} if owner.config is not model.config else {}
            return {**found, "ties": True, "tied": tied, **nested}
    return found


def _twins(model: PreTrainedModel) -> dict[str, str]:
    """Prefix of modules → the prefix of those in another place with the same weights, heads and embeddings aside."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    for name, *others in places.values():
        for other in others:
            if pattern_of(name) != pattern_of(other) and "layers." in name and "layers." in other:
                one, two = (each[: each.index("layers.") + len("layers.")] for each in (name, other))
                if name.removeprefix(one) == other.removeprefix(two):
                    found |= {one: two, two: one}
    return found


def _prefixes(facts: Mapping[str, TensorFact]) -> list[str]:
    """The shortest prefixes under which all tensors are of models beside the language model."""
    others = {pattern for pattern, fact in facts.items() if fact.role != "tower"}
    found: list[str] = []
    for pattern in sorted(pattern for pattern, fact in facts.items() if fact.role == "tower"):
        if pattern.startswith(tuple(found)):
            continue
        parts = pattern.split(".")
        prefixes = (".".join(parts[:length]) + "." for length in range(1, len(parts)))
        found += [each for each in prefixes if not any(other.startswith(each) for other in others)][:1]
    return found


def _tower(prefix: str, facts: Mapping[str, TensorFact]) -> dict[str, Any]:
    """What transformers calls the modules under a prefix of the files, if it is something else."""
    inside = {pattern: fact for pattern, fact in facts.items() if pattern.startswith(prefix)}
    if all(fact.module == pattern for pattern, fact in inside.items()):
        return {}
    modules = {fact.module: fact for fact in inside.values()}
    others = {fact.module: fact for fact in facts.values() if fact.role != "tower"}
    return {"modules": _prefixes({**others, **modules})}


def _described(pattern: str, fact: TensorFact, configs: Mapping[str, Mapping[str, Any]]) -> Any:
    entry: dict[str, Any] = dict(fact.layout)
    if fact.role in ("linear", "experts", "inputs_first"):
        entry["shape"] = expressions(fact.shapes, configs)
    if fact.numbers and fact.role == "linear" and (numbers := count(fact.numbers, configs)) is not None:
        entry["numbers"] = numbers
    if fact.module != pattern:
        entry["module"] = fact.module
    return entry


def text_of(entry: Mapping[str, Any]) -> str:
    """JSON with one line for each pattern."""
    fields = []
    for key, value in entry.items():
        if isinstance(value, dict) and key != "output":
            inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(each)}" for name, each in value.items())
            fields.append(f" {json.dumps(key)}: {{\n{inner}\n }}" if inner else f" {json.dumps(key)}: {{}}")
        else:
            fields.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def main(arguments: Iterable[str] | None = None) -> int:
    """Writes the table, or checks it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args(None if arguments is None else list(arguments))
    transformers.logging.set_verbosity_error()
    different, failed = [], []
    for architecture in asked.architectures or architectures():
        try:
            entry = known(architecture)
            if not entry.keys() & {"linear", "experts", "inputs_first", "recurrent"}:
                print(f"{architecture} has no language model")
                continue
        except Exception as error:
            failed.append(f"{architecture}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        file, text = KNOWN / f"{architecture}.json", text_of(entry)
        own, _, model_type = architecture.partition(".")
        if model_type and {**entry, "model_type": None} == {**known(own), "model_type": None}:
            continue  # its files are spelled as the class's own are
        if not file.exists() or file.read_text() != text:
            different.append(architecture)
            if not asked.check:
                file.write_text(text)
    print(f"{len(different)} differ: {' '.join(different)}")
    print(f"{len(failed)} cannot be made:", *failed, sep="\n  ")
    return 1 if failed or (asked.check and different) else 0


if __name__ == "__main__":
    sys.exit(main())
