"""Tensors of a Hugging Face directory that Megatron's model has no place for: an import would leave them behind."""

import logging
from collections.abc import Iterable

from amaxbridge.bridge.hf import HFModel
from amaxbridge.export.architectures.facts import Role, architecture_of
from amaxbridge.export.dequantized import DequantizedCheckpoint
from amaxbridge.export.output.finalizer import CACHE_SCALES
from amaxbridge.mappings.errors import CheckpointError, listing
from amaxbridge.mappings.names import module_of

_log = logging.getLogger("amaxbridge")


def check_nothing_is_left(
    hf: HFModel, weights: DequantizedCheckpoint, taken: Iterable[str], *, warn: bool = True
) -> None:
    """Compares the tensors of a directory with those that the whole model takes.

    Layers for multi-token prediction change nothing of what a model computes: a warning names those that are left.
    Buffers that no model reads, a tied head and what lies beside the language model are no loss.

    Args:
        taken: every tensor that Megatron's model is filled from, on any rank.
        warn: False where another rank does.

    Raises:
        CheckpointError: the model would compute something else without these tensors; all are named.
    """
    taken, known = frozenset(taken), architecture_of(hf.config)
    read = {each for name in taken for each in weights.checkpoint.names_of(name)}
    quantized = {module_of(name) for name in taken} & {*weights.schemes, *weights.dequantized}
    elsewhere = (*hf.family.carried, *hf.tied_head)
    left, unused = list[str](), list[str]()
    for name in weights.checkpoint.weight_map:
        of_module = module_of(name) in quantized and not name.endswith(".bias")
        if name in read or of_module or name.startswith(elsewhere) or name.endswith(CACHE_SCALES):
            continue
        fact = None if known is None else known.fact(name)
        if fact is not None and fact.role is Role.MTP and "mtp_num_layers" in hf.family.transformer:
            unused.append(name)
        elif fact is None or fact.role is not Role.BUFFER:
            left.append(name)
    if left:
        raise CheckpointError(
            f"Megatron's model has no place for {len(left)} tensors of {hf.directory}:{listing(left)}\n"
            "Correct config.json, from which the model is built (a bias that it does not mention, another number of "
            "layers), or remove them from the files"
        )
    if unused and warn:
        _log.warning(
            "%d tensors of layers for multi-token prediction are left behind; config.json counts no such layer:%s",
            len(unused),
            listing(unused),
        )
