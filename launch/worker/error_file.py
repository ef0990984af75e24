"""Ends this worker for an error, which is written before to the file that its launcher, or torchrun, has named."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from kilobatch.data.errors import UserError
from kilobatch.data.files import is_full_disk, refusal_of, write_whole
from kilobatch.launch.processes.exit_status import REFUSED
from kilobatch.launch.processes.failure_files import ERROR_FILE, error_file_of


@contextmanager
def recording_error() -> Iterator[None]:
    """Records an error that is raised in the context, with its time, and raises it on. The first one that this worker
    records stays: what is raised while it is handled follows from it.

    The time is that of the error and not of the worker's end, which may come much later: a checkpoint that is being
    written is waited for. So the launcher can tell which of several workers failed first.
    """
    try:
        yield
    except Exception as error:
        path = Path(os.environ.get(ERROR_FILE, ""))
        if path.name and not path.exists():
            content = error_file_of(error, traceback.format_exc(), REFUSED if isinstance(error, UserError) else 1)
            with contextlib.suppress(OSError):  # a full disk must not hide the error, which the log has as well
                write_whole(path, [content.model_dump_json().encode()])
        raise


def leave(error: BaseException) -> NoReturn:
    """Exits for an error: with the message of a refusal or of a full disk, else with its stack."""
    if isinstance(error, UserError):
        exit_now(f"kilobatch: {error}", REFUSED)
    if isinstance(error, OSError) and is_full_disk(error):
        exit_now(f"kilobatch: {refusal_of(error)}", REFUSED)
    exit_now("".join(traceback.format_exception(error)), 1)


def exit_now(message: str, code: int) -> NoReturn:
    """Prints the message and exits at once. A normal exit could wait for the other ranks, which hang in a collective
    that this rank has left."""
    print(message, file=sys.stderr, flush=True)
    os._exit(code)
