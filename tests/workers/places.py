"""Model-free PTQ into places of many kinds: SOURCE ROOT. Prints what became of each, as JSON.

Runs where it may mount file systems, and without the capabilities that let root write everywhere.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from amaxbridge.export.model_free.whole_directory import model_free_ptq
from amaxbridge.export.progress import NoProgress
from amaxbridge.mappings.errors import AmaxbridgeError


class Filling(NoProgress):
    """Fills the disk after the first bundle, and ends."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def advance(self, *, tensors: int, nbytes: int) -> None:
        with self._file.open("ab") as file:
            room = os.statvfs(self._file.parent)
            file.write(bytes(room.f_bavail * room.f_frsize))


def mounted(directory: Path, options: str) -> Path:
    directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], check=True)
    return directory


def made(directory: Path, mode: int = 0o755) -> Path:
    directory.mkdir(parents=True)
    directory.chmod(mode)
    return directory


def holding(directory: Path, mode: int = 0o755) -> Path:
    """A directory with an old output."""
    made(directory)
    (directory / "config.json").write_text("old")
    directory.chmod(mode)
    return directory


def remounted(directory: Path) -> Path:
    subprocess.run(["mount", "-o", "remount,ro", directory], check=True)
    return directory


def lock_parent(directory: Path) -> Path:
    directory.parent.chmod(0o555)
    return directory


def link(at: Path, to: Path) -> Path:
    at.parent.mkdir(parents=True, exist_ok=True)
    at.symlink_to(to)
    return at


PLACES: dict[str, Callable[[Path], Path]] = {
    "a mount point": lambda root: mounted(root / "out", "size=8m"),
    "a mount point in use": lambda root: holding(mounted(root / "disk", "size=8m") / "out"),
    "a link to another disk": lambda root: link(root / "here" / "out", mounted(root / "disk", "size=8m") / "out"),
    "a directory below one that is not writable": lambda root: lock_parent(made(root / "locked" / "out")),
    "a disk without room": lambda root: mounted(root / "disk", "size=64k") / "out",
    "a mount point without room": lambda root: mounted(root / "out", "size=64k"),
    "a disk that fills up": lambda root: mounted(root / "disk", "size=8m") / "out",
    "a disk that is read-only": lambda root: remounted(mounted(root / "disk", "size=8m")) / "out",
    "a mount point that is read-only": lambda root: remounted(mounted(root / "out", "size=8m")),
    "nothing, below a directory that is not writable": lambda root: made(root / "locked", 0o555) / "out",
    "nothing, far below it": lambda root: made(root / "locked", 0o555) / "a" / "b" / "out",
    "an old output that is not writable": lambda root: holding(root / "out", 0o555),
    "an empty directory that is not writable": lambda root: made(root / "out", 0o555),
    "neither it nor its parent is writable": lambda root: lock_parent(holding(root / "locked" / "out", 0o555)),
    "a name as long as names can be": lambda root: root / ("o" * 255),
    "a name that is too long": lambda root: root / ("o" * 256),
    "a directory that cannot be looked into": lambda root: made(root / "dark", 0o000) / "out",
}  # fmt: skip


def run(source: Path, output: Path, filling: bool) -> dict[str, str]:
    progress = Filling(output.parent / "filler") if filling else None
    try:
        model_free_ptq(source, output, "nvfp4a16", max_workers=1, overwrite=True, progress=progress)
    except AmaxbridgeError as error:
        return {"error": type(error).__name__, "said": "\n".join([str(error), *getattr(error, "__notes__", ())])}
    return {}


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir() or path.is_symlink())


def main(source: Path, root: Path) -> None:
    found = {}
    for number, (what, make) in enumerate(PLACES.items()):
        place = root / str(number)
        place.mkdir()
        output = make(place)
        found[what] = {**run(source, output, what == "a disk that fills up"), "tree": tree(place)}
        if what == "a disk that fills up":
            (output.parent / "filler").unlink()
            found["the same with room"] = {**run(source, output, False), "tree": tree(place)}
        for directory in place.rglob("*"):
            if directory.is_dir() and not os.access(directory, os.W_OK) and not os.path.ismount(directory):
                directory.chmod(0o755)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
