"""Rank 0's output on this terminal, and as plain lines in its log."""

import errno
import os
import re
import select
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>78]")


class Echo:
    """A pipe whose reading end is here; a pseudo-terminal where our output is one, so that a progress bar shows.

    The terminal gets every byte; the log gets whole lines, without colours and with the last state of each line only.
    """

    def __init__(self, log: BinaryIO, ours: int, workers_end: int) -> None:
        self.workers_end = workers_end
        self._log, self._ours = log, ours
        self._line = b""
        os.set_blocking(ours, False)

    @classmethod
    @contextmanager
    def to_this_terminal(cls, log: Path) -> Iterator["Echo"]:
        if sys.stdout.isatty():
            ours, workers_end = os.openpty()
            termios.tcsetwinsize(workers_end, termios.tcgetwinsize(sys.stdout.fileno()))
        else:
            ours, workers_end = os.pipe()
        with log.open("ab", buffering=0) as file:
            echo = cls(file, ours, workers_end)
            try:
                yield echo
            finally:
                echo.opened()
                os.close(ours)
                if echo._line:
                    file.write(_plain(echo._line) + b"\n")

    def fileno(self) -> int:
        return self._ours

    def opened(self) -> None:
        """The worker has its end: ours of that goes, or the pipe would never end."""
        if self.workers_end >= 0:
            os.close(self.workers_end)
            self.workers_end = -1

    def forward(self) -> bool:
        """Passes on what has come. False once there will be no more."""
        try:
            data = os.read(self._ours, 1 << 16)
        except BlockingIOError:
            return True
        except OSError:  # EIO: how a pseudo-terminal says that the other end is closed
            return False
        with _unheard(sys.stdout):
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._log.write(_plain(line) + b"\n")
        return bool(data)

    def drain(self) -> None:
        """Passes on all that has been written so far; a process that a worker left behind may hold the pipe open."""
        while select.select([self._ours], [], [], 0)[0] and self.forward():
            pass


def tell(message: str) -> None:
    """Prints on stderr, if anyone is left to read it."""
    with _unheard(sys.stderr):
        print(message, file=sys.stderr, flush=True)


@contextmanager
def _unheard(stream: TextIO) -> Iterator[None]:
    """A closed terminal or pipe ends no run: from then on, what is written to `stream` goes nowhere."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def _plain(line: bytes) -> bytes:
    return _CONTROL.sub(b"", line).rstrip(b"\r").rpartition(b"\r")[2]
