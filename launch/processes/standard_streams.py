"""Makes stdin, stdout and stderr usable whatever the caller's are: closed, or in an encoding that lacks characters; and
runs a command so that a refusal is one message there."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from kilobatch.data.errors import UserError
from kilobatch.data.files import os_refusal
from kilobatch.launch.processes.output import IN_ASCII, send_nowhere, tell


def prepare_streams() -> None:
    """Opens the standard streams that the caller has closed, as `>&-` does, and lets none refuse a character.

    Without a stream, the next file that is opened gets its number, and what a library or a child prints goes into it.
    Where the encoding has no `–` or `×`, as ASCII, `-` and `x` are written.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, _open_nowhere(number))
        stream = getattr(sys, name)
        if number and isinstance(stream, io.TextIOWrapper):
            # surrogateescape writes the bytes of file names that are not UTF-8 as they are.
            stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else IN_ASCII)


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


def run_command(command: Callable[[list[str] | None], object], arguments: list[str] | None) -> None:
    """Calls a command line with its arguments. For a refusal, a full disk, or a file that the system does not
    give, it prints one message and exits with 2."""
    try:
        command(arguments)
    except (UserError, OSError) as error:
        message = os_refusal(error) if isinstance(error, OSError) else str(error)
        if message is None:
            raise
        tell(f"kilobatch: {message}")
        sys.exit(2)
    except SystemExit as end:
        flush_stdout()
        if isinstance(end.__context__, BrokenPipeError):  # its reader, such as `head`, has read what it wanted
            sys.exit(0)
        raise
