"""A live export and an import that signals interrupt at each stage. One process, as a user starts it: no torchrun.

interrupted.py HF_DIR ROOT
"""

import contextlib
import io
import signal
import sys
from pathlib import Path

from amaxbridge import cli
from amaxbridge.bridge import AutoBridge, megatron
from amaxbridge.bridge.live.process_ranks import process_group
from amaxbridge.interrupts import Stopped, stopped_by_signals
from amaxbridge.scripts.import_hf import import_hf
from tests.support.interrupting import ENDING, SAVING_MEGATRON, WRITING, as_in_a_terminal, check_interrupted

STAGES = {**SAVING_MEGATRON, **WRITING, **ENDING}


def main(hf: Path, root: Path) -> None:
    with as_in_a_terminal():
        check_import(hf, root)
        with process_group(), megatron.distributed(tp=1):
            check_live_export(AutoBridge.from_hf_pretrained(hf), root)


def check_import(hf: Path, root: Path) -> None:
    def run(out: Path) -> tuple[int, str]:
        sys.argv = ["amaxbridge import", f"hf={hf}", f"output={out}", "io.overwrite=true"]
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                cli.run("import_hf", import_hf)
            except SystemExit as end:
                return int(end.code or 0), said.getvalue()
        raise AssertionError("a command ends in an exit status")

    for stage in ("reading", "opening", "syncing", "moving"):
        (directory := root / f"import {stage}").mkdir()
        check_interrupted(run, directory, STAGES[stage], signal.SIGTERM, continues=False)


def check_live_export(bridge: AutoBridge, root: Path) -> None:
    model = megatron.build_model(bridge.hf)
    bridge.load_hf_weights(model)

    def run(out: Path) -> tuple[int, str]:
        try:
            with stopped_by_signals():
                bridge.save_hf_pretrained(model, out, scheme="nvfp4a16", overwrite=True)
        except Stopped as stop:
            return stop.exit_status, "\n".join([f"error: {stop}", *stop.__notes__])
        return 0, ""

    for stage in ("writing", "verifying", "syncing", "moving"):
        (directory := root / f"live export {stage}").mkdir()
        check_interrupted(run, directory, STAGES[stage], signal.SIGINT, continues=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
