"""All mends, in the order in which they build on one another, and what they find in a checkpoint."""

from dataclasses import dataclass, replace

from amaxbridge.export.repair import config_mends, file_mends, input_scale_mends, target_mends, weight_scale_mends
from amaxbridge.export.repair.edits import Change, Edits, Refusal
from amaxbridge.export.repair.mend import Mend, Unseen
from amaxbridge.export.repair.mended_view import MendedView
from amaxbridge.export.verify.checkpoint_view import CheckpointView

MENDS: tuple[Mend, ...] = (
    *file_mends.FIRST,  # which tensors there are
    *config_mends.MENDS,  # what they are
    *file_mends.SPECS,
    *config_mends.CACHE,
    *target_mends.MENDS,
    *weight_scale_mends.MENDS,
    *input_scale_mends.MENDS,
    *file_mends.LAST,  # the index says what all of this has left
)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What mends find in a checkpoint.

    Args:
        mended: the checkpoint with every edit.
        changes: what is mended.
        refusals: what is wrong and is left.
    """

    mended: MendedView
    changes: tuple[Change, ...]
    refusals: tuple[Refusal, ...]


def diagnose(opened: CheckpointView, unseen: Unseen) -> Diagnosis:
    """Applies every mend, each to what the ones before it have left."""
    view, changes, refusals = MendedView(opened, Edits()), list[Change](), list[Refusal]()
    for mend in MENDS:
        found = [replace(each, mend=mend.name) for each in mend.find(view, unseen)]
        mended = [each for each in found if isinstance(each, Change)]
        changes += mended
        refusals += [each for each in found if isinstance(each, Refusal)]
        if mended:
            view = view.with_(Edits().then(*(each.edits for each in mended)))
    return Diagnosis(view, tuple(changes), tuple(refusals))
