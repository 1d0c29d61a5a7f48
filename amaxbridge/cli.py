"""How every command starts, logs, fails and exits.

Exit status: 0 done, 1 the job failed, 2 wrong arguments, 130 interrupted (143 by SIGTERM, 129 by SIGHUP). An error is
one message on standard error, from one rank, without a traceback unless `debug=true`.

torch, and so the rest of the package, is imported only when a command runs: that takes seconds, and `--help` and a
misspelled option need none of it.
"""

import contextlib
import io
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf

import amaxbridge.configs
from amaxbridge.closed_pipe import quiet_on_closed_pipe
from amaxbridge.configs.option_errors import REFUSED, explained
from amaxbridge.configs.schema import COMMANDS, register
from amaxbridge.interrupts import Stopped, stopped_by_signals

CONFIGS = Path(amaxbridge.configs.__file__).parent


@quiet_on_closed_pipe()
@stopped_by_signals()
def run(name: str, command: Callable[[Any], None]) -> None:
    """Runs `command` with the Hydra configuration `name`, then exits.

    Before the command has started all ranks would print the same, so only one prints.
    """
    register()
    sys.argv[1:] = sorted(map(_at_home, sys.argv[1:]), key=_is_option)  # Hydra takes no flag between options
    silence = contextlib.ExitStack()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors are raised, to be told in our words

    @hydra.main(config_path=str(CONFIGS), config_name=name, version_base="1.3")
    def main(config: DictConfig) -> None:
        silence.close()
        sys.exit(_guarded(name, command, config))

    if not speaks():
        silence.enter_context(contextlib.redirect_stdout(io.StringIO()))
        silence.enter_context(contextlib.redirect_stderr(io.StringIO()))
    try:
        with silence:
            main()
    except REFUSED as error:
        sys.exit(_fail(Exception(explained(error, COMMANDS[name])), 2))
    except Stopped as stop:  # before the command has started
        sys.exit(_fail(stop, stop.exit_status))


def _guarded(name: str, command: Callable[[Any], None], config: DictConfig) -> int:
    from amaxbridge.mappings.errors import AmaxbridgeError, UsageError

    _quiet_logging()
    try:
        options = OmegaConf.to_object(config)
        command(options)
    except MissingMandatoryValue as error:
        return _fail(UsageError(f"{error.full_key}= is required; --help shows all options"), UsageError.exit_status)
    except REFUSED as error:  # a reference to no option
        return _fail(UsageError(explained(error, COMMANDS[name])), UsageError.exit_status)
    except AmaxbridgeError as error:
        if config.debug:
            raise
        return _fail(error, error.exit_status)
    except OSError as error:
        if config.debug:
            raise
        return _fail(error, 1)
    except Stopped as stop:
        return _fail(stop, stop.exit_status)
    return 0


def command_line(name: str) -> str:
    """The command as it can be typed again, with the last name alone of every absolute path: cards are published."""
    words = (re.sub(r"(^|=)(?:/[^/=]+)*/([^/=]+)/?$", r"\1\2", word) for word in sys.argv[1:])
    return shlex.join(["amaxbridge", name, *words])


def speaks() -> bool:
    """True if this process prints what all ranks would: under torchrun, which shares one terminal, rank 0."""
    return _rank() == 0 or "TORCHELASTIC_RUN_ID" not in os.environ


def _at_home(word: str) -> str:
    """Expands `output=~/out`, which only some shells do, and for which Hydra's grammar has no ~."""
    option, is_option, value = word.partition("=")
    return f"{option}={os.path.expanduser(value)}" if is_option and value.startswith("~") else word


def _is_option(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def _rank() -> int:
    """As `amaxbridge.bridge.live.process_ranks.world_rank`, without its imports."""
    return int(os.environ.get("RANK", "0"))


def _fail(error: BaseException, status: int) -> int:
    """Prints the error and its notes (what is kept for another run, say) on standard error.

    An error that all ranks have by construction is printed by one of them, an error of a single rank by that rank.
    """
    alone = getattr(error, "rank", None)
    if speaks() or alone == _rank():
        prefix = "" if alone is None else f"rank {alone}: "
        lines = [f"{prefix}error: {error}", *getattr(error, "__notes__", ())]
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    return status


def _quiet_logging() -> None:
    """Shows our own log, INFO on rank 0 and warnings with a rank prefix elsewhere, and silences the frameworks."""
    rank = _rank()
    prefix = f"rank {rank}: " if rank else ""
    logging.basicConfig(format=prefix + "%(levelname)s: %(message)s", level=logging.ERROR)
    logging.getLogger("torch").setLevel(logging.ERROR)
    logging.getLogger("amaxbridge").setLevel(logging.INFO if speaks() else logging.WARNING)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")
