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
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf

import amaxbridge.configs
from amaxbridge.build_version import build_version
from amaxbridge.closed_pipe import quiet_on_closed_pipe
from amaxbridge.configs.option_errors import REFUSED, as_typed, explained
from amaxbridge.configs.schema import COMMANDS, register
from amaxbridge.configs.words import flags_of, for_hydra, sweep_record, typed_again
from amaxbridge.interrupts import INTERRUPTED, Stopped, stopped_by_signals

CONFIGS = Path(amaxbridge.configs.__file__).parent


@quiet_on_closed_pipe()
@stopped_by_signals()
def run(name: str, command: Callable[[Any], None]) -> None:
    """Runs `command` with the Hydra configuration `name`, then exits.

    Before the command has started all ranks would print the same, so only one prints.
    """
    register()
    silence = contextlib.ExitStack()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors are raised, to be told in our words
    statuses: list[int] = []

    @hydra.main(config_path=str(CONFIGS), config_name=name, version_base="1.3")
    def main(config: DictConfig) -> None:
        silence.close()
        settings = HydraConfig.get()
        if settings.mode is RunMode.MULTIRUN and speaks():
            print(f"job {len(statuses) + 1}: {shlex.join(_overrides())}", file=sys.stderr, flush=True)
        statuses.append(_guarded(name, command, config, settings))
        if statuses[-1] > INTERRUPTED:
            sys.exit(statuses[-1])

    if not speaks():
        silence.enter_context(contextlib.redirect_stdout(io.StringIO()))
        silence.enter_context(contextlib.redirect_stderr(io.StringIO()))
    try:
        sys.argv[1:] = for_hydra(sys.argv[1:], COMMANDS[name])
        if "--version" in sys.argv:
            print(build_version())
            sys.exit(0)
        with silence, tempfile.TemporaryDirectory() as unseen:
            sys.argv += sweep_record(sys.argv[1:], unseen)
            main()
    except REFUSED as error:
        sys.exit(_fail(Exception(explained(error, COMMANDS[name])), 2))
    except Stopped as stop:  # before the command has started
        sys.exit(_fail(stop, stop.exit_status))
    finally:
        HydraConfig.instance().cfg = None  # or whoever calls `command_line` later would get these words
    if len(statuses) > 1 and any(statuses) and speaks():
        failed = [str(number) for number, status in enumerate(statuses, 1) if status]
        print(f"failed: {len(failed)} of {len(statuses)} jobs ({', '.join(failed)})", file=sys.stderr, flush=True)
    sys.exit(max(statuses, default=0))


def _guarded(name: str, command: Callable[[Any], None], config: DictConfig, settings: HydraConf) -> int:
    from amaxbridge.mappings.errors import AmaxbridgeError, UsageError

    _set_up_logging(settings.verbose)
    try:
        _refuse_hidden_choices(settings)
        logging.getLogger("amaxbridge").debug("options:\n%s", OmegaConf.to_yaml(config))
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
    typed = [*flags_of(sys.argv[1:]), *_overrides()] if HydraConfig.initialized() else sys.argv[1:]
    words = (re.sub(r"(^|=)(?:/[^/=]+)*/([^/=]+)/?$", r"\1\2", word) for word in typed)
    return shlex.join(["amaxbridge", name, *words])


def _overrides() -> list[str]:
    """The options of the job that runs, in a sweep with its own values."""
    return typed_again(HydraConfig.get().overrides.task)


def speaks() -> bool:
    """True if this process prints what all ranks would: under torchrun, which shares one terminal, rank 0."""
    return _rank() == 0 or "TORCHELASTIC_RUN_ID" not in os.environ


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
        lines = [f"{prefix}error: {as_typed(str(error))}", *getattr(error, "__notes__", ())]
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    return status


def _refuse_hidden_choices(settings: HydraConf) -> None:
    """Refuses choices of a user's own, as of `--config-dir`, that never count since a built-in has their name."""
    from amaxbridge.mappings.errors import UsageError

    built_in = [path.relative_to(CONFIGS) for path in sorted(CONFIGS.glob("*/*.yaml"))]
    own = [Path(each.path) for each in settings.runtime.config_sources if each.schema == "file"]
    for file in (place / choice for place in own if not place.samefile(CONFIGS) for choice in built_in):
        if file.exists():
            group = file.parent.name
            raise UsageError(f"{file} has the name of a built-in choice: rename it, and give {group}=NEW_NAME")


def _set_up_logging(verbose: bool | str | Sequence[str]) -> None:
    """Shows our own log, INFO on rank 0 and warnings with a rank prefix elsewhere, and silences the frameworks.

    Args:
        verbose: as Hydra means it: True to show everything, or the names of loggers to show everything of.
    """
    rank = _rank()
    prefix = f"rank {rank}: " if rank else ""
    names = [verbose] if isinstance(verbose, str) else list(verbose or ()) if verbose is not True else []
    level = logging.DEBUG if verbose is True else logging.ERROR
    logging.basicConfig(format=f"{prefix}%(levelname)s: {'%(name)s: ' if verbose else ''}%(message)s", level=level)
    for name in names:
        logging.getLogger(name).setLevel(logging.DEBUG)
    if verbose is True:
        logging.getLogger("numba").setLevel(logging.INFO)  # it logs every byte code that it compiles
        return
    for name, least in (("torch", logging.ERROR), ("amaxbridge", logging.INFO if speaks() else logging.WARNING)):
        if name not in names:
            logging.getLogger(name).setLevel(least)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")
