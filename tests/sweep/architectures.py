"""The rows of the sweep: every model type of transformers with a language model in it, and the class that runs it."""

from collections.abc import Iterable
from dataclasses import dataclass

COUNTED = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")
FURTHER = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MULTIMODAL_LM", "TEXT_TO_WAVEFORM")
PUBLISHED, MODULES, SQUARE = "published", "modules", "square"
LAYOUTS = (PUBLISHED, MODULES, SQUARE)
WITHOUT_LANGUAGE_MODEL = ("vits", "fastspeech2_conformer_with_hifigan")


@dataclass(frozen=True, slots=True)
class Row:
    """A model type and one of its classes.

    Args:
        counted: True for causal language models and models of images and text; the goal counts these.
    """

    model_type: str
    architecture: str
    counted: bool


def rows(types: Iterable[str] = ()) -> list[Row]:
    """All rows, sorted; only those of `types` if any are given."""
    from transformers.models.auto import modeling_auto

    found: dict[tuple[str, str], bool] = {}
    for task in (*COUNTED, *FURTHER):
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault((model_type, name), task in COUNTED)
    wanted = set(types)
    return [
        Row(*key, counted)
        for key, counted in sorted(found.items())
        if key[0] not in WITHOUT_LANGUAGE_MODEL and (not wanted or key[0] in wanted)
    ]
