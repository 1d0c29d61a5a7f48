"""The processes that write one checkpoint: ranks of a live model, which talk, or processes that never do.

Ranks of a live model exchange tensors, so they begin and end together: the first opens the staging directory and moves
it into place, and its errors are raised on all. Processes that read a checkpoint compute the same plan from the same
files; each does its share whenever it runs, and the last one completes the work. They meet only in the staging
directory.
"""

import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from amaxbridge.export.disk.shard_layout import Layout
from amaxbridge.export.disk.staging import ALONE, Share, StagedDirectory, check_output
from amaxbridge.export.output.provenance import made_from
from amaxbridge.mappings.errors import AmaxbridgeError, WriteError
from amaxbridge.mappings.ranks import Axis, Ranks

_log = logging.getLogger("amaxbridge")


class Writers(Protocol):
    """This process among those that write a checkpoint."""

    @property
    def me(self) -> int:
        """Its number among the owners of the plan."""

    @property
    def first(self) -> bool:
        """True for the process that warns of what all of them see."""

    @property
    def share(self) -> Share:
        """The share as which it opens the staging directory."""

    def check_output(self, target: Path, *, overwrite: bool) -> None:
        """Raises OutputExistsError if the target holds what must not be replaced, as far as is known now."""

    def open(self, staged: StagedDirectory, layout: Layout) -> frozenset[str] | None:
        """As `StagedDirectory.open`."""

    def end(self, staged: StagedDirectory, bundles: Collection[str], finish: Callable[[], None]) -> bool:
        """Ends the work of this process, which has written its bundles.

        Args:
            staged: the staging directory.
            bundles: keys of all bundles.
            finish: completes the directory and moves it into place; one process calls it, once all are written.

        Returns:
            True if it was this process.
        """


class Together:
    """Ranks of a live model. `open` and `end` are collective: errors of the first rank are raised on all."""

    share = ALONE  # the first opens the directory for all

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.me = ranks.members(Axis.WORLD)[ranks.rank(Axis.WORLD)]
        self.first = ranks.rank(Axis.WORLD) == 0

    def check_output(self, target: Path, *, overwrite: bool) -> None:
        check_output(target, overwrite=overwrite)

    def open(self, staged: StagedDirectory, layout: Layout) -> frozenset[str] | None:
        done, root = self._from_first(lambda: (staged.open(layout), staged.root))
        if not self.first:
            staged.join(root)
        return done

    def end(self, staged: StagedDirectory, bundles: Collection[str], finish: Callable[[], None]) -> bool:
        def commit() -> None:
            finish()
            staged.commit()

        self._ranks.all_gather_object(Axis.WORLD, None)  # all ranks have written theirs
        self._from_first(commit)
        return self.first

    def _from_first[T](self, make: Callable[[], T]) -> T:
        """The result of the first rank, or its error, on every rank."""
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
        """Checks nothing yet: the other processes may have finished; this is looked at once the plan is known."""
        by_others = self.share.world > 1 and made_from(target) is not None
        check_output(target, overwrite=overwrite or by_others)

    def open(self, staged: StagedDirectory, layout: Layout) -> frozenset[str] | None:
        done = staged.open(layout)
        if done is None:
            _log.info("the other ranks have already written %s; remove it to write it anew", staged.target)
        return done

    def end(self, staged: StagedDirectory, bundles: Collection[str], finish: Callable[[], None]) -> bool:
        left = staged.left(bundles)
        if left and self.share.world == 1:
            raise WriteError(
                f"{staged.root}: the journal lacks {left:,} bundles, though all were written: something else changed "
                "it. Run the same command again"
            )
        if left:
            _log.info(
                "rank %d of %d has written its share; other ranks still have to write %d of %d bundles, and the last "
                "of them moves %s into place. If none is running, run them again: the same command continues from here",
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
