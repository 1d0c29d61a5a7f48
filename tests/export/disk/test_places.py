"""Outputs on real file systems: mount points, other disks, full and read-only ones, directories without permission.

One error before work where it can be known; and no trace of a run that was refused.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from amaxbridge.export.disk.output_place import resolved_output
from amaxbridge.mappings.errors import UsageError
from tests.support.checkpoints import dense_model, write_checkpoint
from tests.support.paths import ENVIRONMENT, ROOT, WORKERS

MADE = ["README.md", "amaxbridge.json", "config.json", "model.safetensors", "tokenizer_config.json"]
WELL = {
    "a mount point": "out",
    "a mount point in use": "disk/out",
    "a link to another disk": "disk/out",
    "a directory below one that is not writable": "locked/out",
    "the same with room": "disk/out",
}
REFUSED = {
    "a disk without room": ("WriteError", r"bytes are to be written, the disk has room for 65,536: free space"),
    "a mount point without room": ("WriteError", r"bytes are to be written, the disk has room for 65,536: free space"),
    "a disk that fills up": ("WriteError", r"No space left on device; free space and run the same command again"),
    "a disk that is read-only": ("UsageError", r"Read-only file system; choose another output"),
    "a mount point that is read-only": ("UsageError", r"is not writable for this user: .* choose another output"),
    "nothing, below a directory that is not writable": ("UsageError", r"Permission denied; choose another output"),
    "nothing, far below it": ("UsageError", r"locked/a: Permission denied; choose another output"),
    "an old output that is not writable": ("UsageError", r"is not writable for this user: make it so"),
    "an empty directory that is not writable": ("UsageError", r"is not writable for this user: make it so"),
    "neither it nor its parent is writable": ("UsageError", r"is not writable for this user: make it so"),
    "a name as long as names can be": ("UsageError", r"File name too long; choose another output"),
    "a name that is too long": ("UsageError", r"leads nowhere \(File name too long\): give another path"),
    "a directory that cannot be looked into": ("UsageError", r"leads nowhere \(Permission denied\)"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any] | None:
    """Place → what became of it; None where this machine lets no process mount anything."""
    root = tmp_path_factory.mktemp("places")
    source = write_checkpoint(root / "in", dense_model())
    (root / "work").mkdir()
    may_mount = ["unshare", "--user", "--map-root-user", "--mount"]
    as_others = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    work = [sys.executable, WORKERS / "places.py", source, root / "work"]
    ended = subprocess.run([*may_mount, *as_others, *work], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    if re.match(r"(unshare|setpriv): ", ended.stderr):
        return None
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    assert found.keys() == {*WELL, *REFUSED}
    return found


@pytest.mark.parametrize("place", WELL)
def test_places_that_are_written_to(outcomes: dict[str, Any] | None, place: str) -> None:
    if outcomes is not None:
        assert "error" not in outcomes[place]
        where = WELL[place]
        assert [path for path in outcomes[place]["tree"] if path != "here/out"] == [f"{where}/{name}" for name in MADE]


@pytest.mark.parametrize("place", REFUSED)
def test_places_that_are_refused(outcomes: dict[str, Any] | None, place: str) -> None:
    if outcomes is not None:
        error, message = REFUSED[place]
        found = outcomes[place]
        assert found.get("error") == error
        assert re.search(message, found["said"]), found["said"]
        old = {"an old output that is not writable": "out", "neither it nor its parent is writable": "locked/out"}
        assert found["tree"] == (
            ["disk/filler"]
            if place == "a disk that fills up"
            else [f"{old[place]}/config.json"]
            if place in old
            else []
        )


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    """Whatever the file system says about them."""
    (tmp_path / "circle").symlink_to("circle")
    paths = ["a\0b", "o" * 256, "/".join(["o"] * 4000), "~nobody-of-this-name/out", tmp_path / "circle", "a\ud800b"]
    for path in paths:
        with pytest.raises(UsageError, match="leads nowhere"):
            resolved_output(path)
    assert len(paths) == 6
