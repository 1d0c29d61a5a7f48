"""What happens when nobody reads standard output any more, as after `amaxbridge --help | head -1`."""

import contextlib
import os
import select
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_on_closed_pipe() -> Iterator[None]:
    """Exits with 1 and without a traceback if the reader of standard output is gone, as rich does in its tables.

    The output is flushed here: the interpreter, which would do it at its end, prints the error that it then meets.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_closed(sys.stdout.fileno()):  # another pipe broke
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes there
        sys.exit(1)


def _is_closed(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
