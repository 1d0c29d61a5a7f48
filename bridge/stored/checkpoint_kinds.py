"""The kinds of directories and checkpoints that cannot be exported as they are: one table.

Files and tensors are recognized by their names, and tensors also by their shapes if a name says nothing. Each kind has
a name and a next step. The first kind that fits applies.

Sources: `megatron.training.checkpointing` (formats, names of directories), Megatron-FSDP, Megatron-Bridge's PEFT, NeMo,
DeepSpeed, PEFT and torchtitan for the names that each of them writes.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from amaxbridge.export.disk.input_files import read_input
from amaxbridge.mappings.adapters import NEXT_STEP
from amaxbridge.mappings.tensors import TensorSpec

LATEST = "latest_checkpointed_iteration.txt"
METADATA = ".metadata"
MODEL_FILE = "model_optim_rng.pt"
"""What a rank saves of the model in a legacy checkpoint, `mp_rank_…/model_optim_rng.pt`."""
_ITERATION = re.compile(r"iter_\d{7}|release")
_MOST_FILES = 4096  # files of a directory that are looked at


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of directory or checkpoint.

    Args:
        sign: pattern for the start of a line: the path of a file, or a tensor's name and shape, `name [8, 4]`.
        what: completes "this is …".
        next_step: what the user can do, as a sentence.
        every: the sign must match all lines instead of any line.
        adapters: True if it can be exported where `adapter=` says how.
    """

    sign: str
    what: str
    next_step: str
    every: bool = False
    adapters: bool = False

    def fits(self, lines: Collection[str]) -> bool:
        """True if these files or tensors are of this kind."""
        found = (re.match(self.sign, line) is not None for line in lines)
        return bool(lines) and (all(found) if self.every else any(found))


_RESAVE = "Load it in Megatron and save it with --ckpt-format torch_dist"
_TWO_DIRECTORIES = "checkpoint= takes what Megatron's training saved, and hf= the directory with config.json"

DIRECTORIES: tuple[Kind, ...] = (
    Kind(
        r"adapter_config\.json|adapter_model\.",
        "an adapter of PEFT, in Hugging Face's format",
        "Merge it into its model (merge_and_unload), save that, and quantize it: amaxbridge quantize input=DIRECTORY",
    ),
    Kind(
        r"config\.json|model.*\.safetensors|pytorch_model.*\.bin",
        "a Hugging Face directory",
        f"{_TWO_DIRECTORIES}. To quantize this one without Megatron: amaxbridge quantize input=DIRECTORY",
    ),
    Kind(
        r"(iter_\d+/)?mp_rank_\d+(_\d+)*(/|$)",
        f"a legacy checkpoint (--ckpt-format torch) without {MODEL_FILE}, where each rank saves its part of the model",
        f"Copy it whole. An older Megatron names this file otherwise: {_RESAVE[0].lower()}{_RESAVE[1:]}",
    ),
    Kind(
        r"(.*/)?(mp_rank_\d+_model_states\.pt|(bf16_)?zero_pp_rank_|layer_\d+-model_)|global_step\d+(/|$)",
        "a DeepSpeed checkpoint",
        "Make a Hugging Face checkpoint of it with DeepSpeed's zero_to_fp32.py, then use amaxbridge quantize",
    ),
    Kind(
        r".*/\.z(array|group|attrs)$",
        "a checkpoint in the zarr format, which Megatron-Core no longer writes",
        f"{_RESAVE}, with a release that still reads zarr (Megatron-Core 0.13 or older)",
    ),
    Kind(
        r"weights/(\.metadata|.*\.distcp)",
        "a NeMo 2 checkpoint",
        "Its weights are in the directory weights: give that as checkpoint=",
    ),
    Kind(
        r"(model_weights(/|\.ckpt)|model_config\.yaml$|.*\.nemo$)",
        "a NeMo 1 checkpoint",
        "Convert it with NeMo to Megatron's torch_dist, or to Hugging Face's format for amaxbridge quantize",
    ),
    Kind(
        r"(.*/)?iter_\d+_\d+_local\.pt$",
        "a local checkpoint (--non-persistent-ckpt-type local), for a restart of the same job",
        "Give the checkpoint at --save",
    ),
    Kind(
        r"[^/]*\.distcp$|\.metadata\.tmp$",
        "the beginning of a distributed checkpoint: tensors without .metadata, which is written last. Its save was "
        "interrupted, or is still running (--async-save)",
        "Wait for the save, or give an earlier iteration",
    ),
    Kind(r".*\.gguf$", "a GGUF file of llama.cpp", "Load it in transformers (gguf_file=), save it, and quantize that"),
    Kind(
        r"[^/]*\.(ckpt|pt|pth|bin)$",
        "a checkpoint of PyTorch pickles, from another training framework",
        "Save it from that framework in Megatron's torch_dist, or in Hugging Face's format for amaxbridge quantize",
    ),
)
"""Kinds of a directory without `.metadata`, by its files."""

_LAYER = r"layers\.(\d+\.)?"
_ADAPTER = r"(.*\.(adapter\w*|lora_[abAB]\w*|magnitude|weight_magnitude)(\.|\s)|.*\blora_[AB]\b)"

_HEAD = Kind(
    r"\w*(head|reward|value|score|critic|classifier)\w*(\.|\s)",
    "a model with a head beside Megatron's own modules (a reward model, a critic or a classifier)",
    "A head is exported where it replaces output_layer, one linear [labels, hidden]: assign it to that name of the "
    "model, and save it again",
)

TENSORS: tuple[Kind, ...] = (
    Kind(
        r"model\d+\.(module\.)+",
        "a checkpoint of Megatron-FSDP (--ckpt-format fsdp_dtensor) with a virtual pipeline, whose stages count their "
        "layers each from 0",
        f"{_RESAVE}, or export from the training: save_hf_pretrained",
    ),
    Kind(
        _ADAPTER,
        "adapters (LoRA) without the model that they belong to",
        f"{NEXT_STEP}; the model that they belong to is hf=, or the checkpoint at adapter.base=",
        every=True,
        adapters=True,
    ),
    Kind(
        rf"{_ADAPTER}|.*\.to_wrap\.",
        "a model with adapters (LoRA) that are not merged",
        NEXT_STEP,
        adapters=True,
    ),
    Kind(
        r"(.*\.)?_?teacher_model\.",
        "a model under distillation, with its teacher",
        "Export the student with ModelOpt's mtd.export, then save it again",
    ),
    Kind(
        r"(.*\.)?(eagle_module|eagle_\w+|medusa_heads?)\.",
        "a model with a draft model for speculative decoding (EAGLE, Medusa)",
        "Save the model without the draft; ModelOpt exports drafts",
    ),
    Kind(
        r"language_model\.(encoder|transformer)\.",
        "a checkpoint of Megatron-LM before Megatron-Core (--use-legacy-models)",
        "Convert it with Megatron-LM's tools/checkpoint/convert.py --saver core",
    ),
    Kind(
        r"(vision_model|vision_projection|vision_tower|language_model|image_encoder)\.",
        "a model with several parts (images and language)",
        "Save its language model alone: model.language_model",
    ),
    Kind(
        r"encoder\.layers\.|(binary_head|pooler|lm_head)\.(?!.*\[1, )|.*\.(inter|cross)_attention\.\w",
        "an encoder, or an encoder with a decoder (BERT, T5)",
        "Only decoders can be exported",
    ),
    Kind(
        rf"(model\.)?(embed_tokens|tok_embeddings)\.|(\w+\.)*{_LAYER}(self_attn|attention|feed_forward)\.",
        "a PyTorch checkpoint with the names of Hugging Face or torchtitan, not Megatron's",
        "Save it as safetensors in Hugging Face's format, and quantize that: amaxbridge quantize input=DIRECTORY",
    ),
    _HEAD,
    Kind(
        r"(?!decoder\.|embedding\.|output_layer\.|mtp\.)(\w+\.)+(decoder\.layers|embedding\.word_embeddings)\.",
        "a Megatron model inside another module, whose name precedes every tensor name",
        "Save the model itself, without the wrapper of the training framework, and give that",
    ),
)
"""Kinds of a distributed checkpoint, by its tensors, without those of the optimizer."""

OPTIMIZER = Kind(
    "",
    "the state of an optimizer without a model",
    "Give a checkpoint that holds the model, saved without --no-save-model",
)


def head_of(model: Mapping[str, TensorSpec]) -> TensorSpec | None:
    """The weight of a head in place of the output layer, with fewer rows than the embedding; None if there is none."""
    output, embedding = model.get("output_layer.weight"), model.get("embedding.word_embeddings.weight")
    return output if output and embedding and output.shape[0] < embedding.shape[0] else None


def kind_of_tensors(model: Mapping[str, TensorSpec], *, any_others: bool, adapters: bool = False) -> Kind | None:
    """The kind of a distributed checkpoint that cannot be exported as it is, None for one that can.

    Args:
        model: the tensors that belong to no optimizer.
        any_others: True if the checkpoint has other tensors.
        adapters: True if adapters are wanted.
    """
    if not model and any_others:
        return OPTIMIZER
    lines = [f"{name} {list(spec.shape)}" for name, spec in model.items()]
    kind = next((kind for kind in TENSORS if not (adapters and kind.adapters) and kind.fits(lines)), None)
    if kind is _HEAD:
        return replace(kind, what=f"{kind.what}: {', '.join(line for line in lines if kind.fits([line]))}")
    return kind


def kind_of_directory(path: Path) -> Kind | None:
    """The kind of a directory without a distributed checkpoint, None if unknown."""
    lines = files_in(path)
    return next((kind for kind in DIRECTORIES if kind.fits(lines)), None)


def why_not(path: Path) -> str:
    """What is at a path without a distributed checkpoint, and what to do next: completes "is not a …: …"."""
    if not path.exists():
        return "there is nothing at this path"
    if path.is_file():
        return "it is a file; give the directory that contains it"
    found = iterations(path)
    if (path / LATEST).is_file():
        text = (read_input(path / LATEST, path) or b"").decode(errors="replace").strip()
        there = f"there are {', '.join(found)}: give one of them" if found else "there is no iteration either"
        return f"{LATEST} says {text[:40]!r}, whose checkpoint is not there; {there}"
    if found:
        return f"it has iterations but no {LATEST}: give one of {', '.join(found)} in it"
    kind = kind_of_directory(path)
    if kind is not None:
        return f"it is {kind.what}. {kind.next_step}"
    inside = sorted(each.name for each in path.iterdir() if each.is_dir() and is_training_output(each))
    if inside:
        return f"it is a directory of trainings: give one of {', '.join(inside[:8])} in it"
    return "it is empty" if not any(path.iterdir()) else f"no {METADATA} there, and nothing else that is known"


def is_training_output(path: Path) -> bool:
    """True if a directory is Megatron's save directory, or one iteration in it, in any format."""
    ranks = any(path.glob("mp_rank_*")) or any(path.glob("*.distcp"))
    return ranks or (path / LATEST).is_file() or (path / METADATA).is_file() or bool(iterations(path))


def rank_files(path: Path) -> list[str]:
    """The files of ranks in an iteration of a legacy checkpoint, by relative path, in order; none in any other."""
    return sorted(f"{file.parent.name}/{file.name}" for file in path.glob(f"mp_rank_*/{MODEL_FILE}") if file.is_file())


def iterations(path: Path) -> list[str]:
    """The iteration directories in a save directory of training, in order."""
    return sorted(each.name for each in path.iterdir() if each.is_dir() and _ITERATION.fullmatch(each.name))


def files_in(path: Path) -> list[str]:
    """The files in a directory and two levels below, by relative path; the first ones of a large directory."""

    def below(directory: Path, prefix: str, depth: int) -> Iterable[str]:
        for each in sorted(directory.iterdir()):
            yield prefix + each.name
            if depth and each.is_dir():
                yield from below(each, f"{prefix}{each.name}/", depth - 1)

    return list(islice(below(path, "", 2), _MOST_FILES))
