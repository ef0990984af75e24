"""What a worker writes: as timed lines in its log, the last of them kept, rank 0's on this terminal as well."""

import errno
import os
import re
import select
import sys
import termios
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, TextIO

_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>78]")
KEPT = 200  # lines: the longest message of a failing worker


class Output:
    """A pipe whose reading end is here.

    log: gets whole lines, without colours and with the last state of each line only, each after the time at which it
    came, in UTC: `2026-11-22T07:50:01.123Z step 7`. shown: our own output gets every byte as well, and where that is a
    terminal the worker has one, too, so that a progress bar shows.
    """

    def __init__(self, log: Path, *, shown: bool) -> None:
        self.lines: deque[str] = deque(maxlen=KEPT)  # the last, without their times
        self._shown = shown
        self._line = b""
        self._log: BinaryIO = log.open("ab", buffering=0)
        if shown and sys.stdout.isatty():
            self._ours, self.workers_end = os.openpty()
            termios.tcsetwinsize(self.workers_end, termios.tcgetwinsize(sys.stdout.fileno()))
        else:
            self._ours, self.workers_end = os.pipe()
        os.set_blocking(self._ours, False)

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
        if self._shown:
            with _unheard(sys.stdout):
                sys.stdout.buffer.write(data)
                sys.stdout.flush()
        *lines, self._line = (self._line + data).split(b"\n")
        self._keep(lines)
        if len(self._line) > 1 << 16:  # a bar overwrites its line for hours and never ends it
            self._line = self._line[self._line.rfind(b"\r", 0, -1) + 1 :]
        return bool(data)

    def drain(self) -> None:
        """Passes on all that has been written so far; a process that a worker left behind may hold the pipe open."""
        while select.select([self._ours], [], [], 0)[0] and self.forward():
            pass

    def close(self) -> None:
        self.opened()
        os.close(self._ours)
        if self._line:
            self._keep([self._line])
        self._log.close()

    def _keep(self, lines: list[bytes]) -> None:
        if not lines:
            return
        plain = [_plain(line) for line in lines]
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3].encode() + b"Z "
        self._log.write(b"".join(now + line + b"\n" for line in plain))
        self.lines.extend(line.decode(errors="replace") for line in plain)


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
