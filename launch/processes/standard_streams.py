"""Makes stdin, stdout and stderr usable whatever the caller's are: closed, or in an encoding that lacks characters."""

import io
import os
import sys
from pathlib import Path

from kilobatch.launch.processes.output import send_nowhere


def prepare_streams() -> None:
    """Opens the standard streams that the caller has closed, as `>&-` does, and lets none refuse a character.

    Without a stream, the next file that is opened gets its number, and what a library or a child prints goes into it.
    Where the encoding has no `–` or `×`, as ASCII, a `?` is written.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, _open_nowhere(number))
        stream = getattr(sys, name)
        if number and isinstance(stream, io.TextIOWrapper):
            # surrogateescape writes the bytes of file names that are not UTF-8 as they are.
            stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else "replace")


def _open_nowhere(number: int) -> io.TextIOWrapper:
    """A stream that leads nowhere. It gets this file descriptor, unless a file has taken it by now."""
    nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if nowhere > number and not Path(f"/proc/self/fd/{number}").exists():
        os.dup2(nowhere, number)
        os.close(nowhere)
        nowhere = number
    os.set_inheritable(nowhere, nowhere <= 2)
    return io.TextIOWrapper(io.FileIO(nowhere, "r" if number == 0 else "w"), encoding="utf-8")


def flush_stdout() -> None:
    """Writes what is left to stdout, or nowhere where its reader has ended, as `| head` does."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        send_nowhere(sys.stdout)
