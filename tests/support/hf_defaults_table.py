"""Makes `bridge/hf_defaults.json` of transformers' configuration classes: `python -m tests.support.hf_defaults_table`.

What a family reads is recorded while its tables are read, of published models and of the tiny ones. Only what is off,
on or empty by default is taken from a class; sizes, lists and numbers a config.json has to say.
"""

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from amaxbridge.mappings.families import FAMILIES, family_of
from amaxbridge.mappings.family import ModelFamily
from tests.support.paths import PUBLISHED_MODELS, ROOT
from tests.support.published_models import class_of, configured
from tests.support.tiny_models import TINY_MODELS

TABLE = ROOT / "bridge" / "hf_defaults.json"
CONFIGS = sorted(PUBLISHED_MODELS.glob("*.json"))

_WIDTH = 6144  # no class has this one by default


class Recorded(Mapping[str, Any]):
    """A configuration that notes which of its fields are asked for, one by one and not in a copy of all."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self._copied = list[str]()
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        if name in self._copied:
            self._copied.remove(name)
        else:
            self.asked.add(name)
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        self._copied += self._fields
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def read_of(family: ModelFamily, config: Mapping[str, Any]) -> tuple[set[str], dict[str, Any]]:
    """The fields that an export reads of a language model's configuration, and the settings that come of it."""
    recorded = Recorded(config)
    settings = {**family.weight_settings(recorded), "pattern": family.layer_pattern(recorded)}
    family.registry_for(recorded)
    settings["tied"] = bool(recorded.get("tie_word_embeddings"))
    settings["vocab_size"] = recorded["vocab_size"]
    return recorded.asked, settings


def filled(written: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration completed by transformers."""
    config: dict[str, Any] = configured(written).to_dict()
    return config


def table() -> dict[str, Any]:
    """The contents of the file."""
    from transformers import PreTrainedConfig

    common = set(PreTrainedConfig().to_dict()) - {"tie_word_embeddings"}
    read: dict[int, set[str]] = {}
    samples = [filled(json.loads(path.read_text())) for path in CONFIGS]
    for config in [*samples, *(model.make().to_dict() for model in TINY_MODELS.values())]:
        family = family_of(config)
        asked, _ = read_of(family, family.language_config(config))
        read.setdefault(id(family), set()).update(asked - common - {"architectures"})
    architectures = {
        architecture: _entry(architecture, family, sorted(read[id(family)]))
        for family in FAMILIES
        for architecture in family.architectures
    }
    return {"source": f"transformers {version('transformers')}", "architectures": dict(sorted(architectures.items()))}


def _entry(architecture: str, family: ModelFamily, names: list[str]) -> dict[str, Any]:
    default = _configured(architecture, family)
    aliases = {field: alias for alias, field in _aliases(architecture, family).items()}
    defaults, same, required = dict[str, Any](), dict[str, str](), list[str]()
    for name in names:
        if name not in default:
            continue  # the class has no such field, and the family knows what that means
        if name in aliases:
            same[name] = aliases[name]
        if isinstance(default[name], bool) or default[name] in (None, []):
            defaults[name] = default[name]
        elif name == "head_dim" and _divides(architecture, family):
            defaults[name] = None  # the family divides the hidden size among the heads likewise
        else:
            required.append(name)
    return {"defaults": defaults, "same": same, "required": required}


def _configured(architecture: str, family: ModelFamily, **changes: Any) -> dict[str, Any]:
    """The default configuration of a language model, with fields changed."""
    kind = class_of({"architectures": [architecture]}).config_class
    made = kind(**({family.language_part: changes} if family.language_part else changes)).to_dict()
    config: dict[str, Any] = family.language_config(made)
    return config


def _aliases(architecture: str, family: ModelFamily) -> Mapping[str, str]:
    """Other name of a field of a language model's configuration → the field."""
    config = class_of({"architectures": [architecture]}).config_class()
    aliases: Mapping[str, str] = (
        getattr(config, family.language_part) if family.language_part else config
    ).attribute_map
    return aliases


def _divides(architecture: str, family: ModelFamily) -> bool:
    """True if the default head width is the hidden size divided by the number of heads."""
    wide = _configured(architecture, family, hidden_size=_WIDTH)
    return bool(wide["head_dim"] == _WIDTH // wide["num_attention_heads"])


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(), indent=2) + "\n")
