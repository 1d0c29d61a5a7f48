"""The processes that write one checkpoint: ranks of a live model, which talk, or processes that never do.

Ranks of a live model exchange tensors, so they begin and end together: the first opens the staging directory and moves
it into place, and what it meets is raised on all. Processes that read a checkpoint compute the same plan from the same
files; each does its part whenever it runs, and the last one ends the work. They meet in the staging directory alone.
"""

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from amaxbridge.export.disk.shard_layout import Layout
from amaxbridge.export.disk.staging import ALONE, Share, StagedDirectory, check_output
from amaxbridge.export.output.provenance import made_from
from amaxbridge.mappings.errors import AmaxbridgeError
from amaxbridge.mappings.ranks import Axis, Ranks

_log = logging.getLogger("amaxbridge")


class Writers(Protocol):
    """This process among those that write a checkpoint."""

    @property
    def me(self) -> int:
        """Its number, as the plan has them for owners."""

    @property
    def first(self) -> bool:
        """Whether it is the one that warns of what all of them see."""

    @property
    def share(self) -> Share:
        """As which it opens the staging directory."""

    def check_output(self, target: Path, *, overwrite: bool) -> None:
        """Raises OutputExistsError when the target holds what may not be replaced, as far as it can be told now."""

    def open(self, staged: StagedDirectory, layout: Layout) -> frozenset[str] | None:
        """As `StagedDirectory.open`."""

    def end(self, staged: StagedDirectory, bundles: Collection[str], finish: Callable[[], None]) -> bool:
        """Called when this process has written its bundles, of all `bundles`.

        Args:
            finish: completes the directory once all are written; one process does, and puts it into place.

        Returns:
            Whether it was this one.
        """


class Together:
    """Ranks of a live model. `open` and `end` are collective: what the first meets is raised on all."""

    share = ALONE  # the first opens the directory for all

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.me = ranks.members(Axis.WORLD)[ranks.rank(Axis.WORLD)]
        self.first = ranks.rank(Axis.WORLD) == 0

    def check_output(self, target: Path, *, overwrite: bool) -> None:
        check_output(target, overwrite=overwrite)

    def open(self, staged: StagedDirectory, layout: Layout) -> frozenset[str] | None:
        return self._from_first(lambda: staged.open(layout))

    def end(self, staged: StagedDirectory, bundles: Collection[str], finish: Callable[[], None]) -> bool:
        def commit() -> None:
            finish()
            staged.commit()

        self._ranks.all_gather_object(Axis.WORLD, None)  # all have written theirs
        self._from_first(commit)
        return self.first

    def _from_first[T](self, make: Callable[[], T]) -> T:
        """What the first rank makes, or the error that it meets, on every rank."""
        made: T | Exception | None = None
        if self.first:
            try:
                made = make()
            except (AmaxbridgeError, OSError) as error:
                made = error
        of_first: T | Exception = self._ranks.all_gather_object(Axis.WORLD, made)[0]
        if isinstance(of_first, Exception):
            raise of_first
        return of_first


class Apart:
    """Processes that never talk, each with a share of the bundles."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self.me = share.rank
        self.first = share.rank == 0

    def check_output(self, target: Path, *, overwrite: bool) -> None:
        """What the other processes may have made just now is looked at when the plan is known."""
        by_others = self.share.world > 1 and made_from(target) is not None
        check_output(target, overwrite=overwrite or by_others)

    def open(self, staged: StagedDirectory, layout: Layout) -> frozenset[str] | None:
        done = staged.open(layout)
        if done is None:
            _log.info("%s is there already, made by the other ranks; remove it to make it anew", staged.target)
        return done

    def end(self, staged: StagedDirectory, bundles: Collection[str], finish: Callable[[], None]) -> bool:
        left = staged.left(bundles)
        if left:
            _log.info(
                "rank %d of %d has written its share; %d of %d parts are missing, which other ranks write: the last of "
                "them puts %s into place. Where none is running, the same command goes on from here",
                self.share.rank,
                self.share.world,
                left,
                len(bundles),
                staged.target,
            )
        if left != 0:
            return False
        finish()
        staged.commit()
        return True
