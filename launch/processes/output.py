"""Forwards a worker's output: as lines with their times to its log, and rank 0's to this terminal as well, in the
characters that it has."""

import codecs
import errno
import os
import re
import select
import sys
import termios
import time
import unicodedata
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, TextIO

from kilobatch.data.files import is_full_disk, refusal_of, refusing_os_errors

_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>78]")
KEPT_LINES = 200  # of each worker's last output: the longest message of a failing worker
IN_ASCII = "kilobatch.in_ascii"  # the error handler of streams whose encoding lacks characters
_IN_ASCII = {"…": "...", "–": "-", "−": "-", "×": "x", "·": "*", "√": "sqrt ", "²": "^2", "±": "+-", "°": " degrees"}
_IN_ASCII |= dict.fromkeys("µμ", "u")


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    """What stands for the first character that an encoding lacks, so that none is lost: its look in ASCII, or its code.
    The bytes of file names that are not text are written as they are."""
    assert isinstance(error, UnicodeEncodeError)
    lacking, after = error.object[error.start], error.start + 1
    if "\udc80" <= lacking <= "\udcff":
        return bytes([ord(lacking) - 0xDC00]), after
    return _IN_ASCII.get(lacking) or _line(lacking) or lacking.encode("ascii", "backslashreplace").decode(), after


def _line(character: str) -> str:
    """A part of a table's lines or of a bar; "" for any other character."""
    name = unicodedata.name(character, "")
    if not name.startswith("BOX DRAWINGS"):
        return ""
    turns = "AND" in name or ("VERTICAL" in name and "HORIZONTAL" in name)
    return "+" if turns else "|" if "VERTICAL" in name else "-"


codecs.register_error(IN_ASCII, _in_ascii)


class WorkerOutput:
    """A pipe that a worker writes to and this process reads.

    log: gets whole lines, each after the time at which it came, in UTC: `2026-11-22T07:50:01.123Z step 7`; without
    colours, and only the last state of a line that was overwritten. shown: every byte goes to our own output as well;
    where that is a terminal, the pipe is a pseudo-terminal, so that the worker shows a progress bar.
    failure: why the log, or our own output, could not be written, and when that was (time.monotonic()); None: it could.
    """

    def __init__(self, log: Path, *, shown: bool) -> None:
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)  # the last ones, without their times
        self._shown = shown
        self._decoder = utf8_decoder()
        self._line = b""
        self.failure: tuple[str, float] | None = None
        self._path = log
        with refusing_os_errors(log):
            self._log: BinaryIO = log.open("ab", buffering=0)
        if shown and sys.stdout.isatty():
            self._ours, self.workers_end = os.openpty()
            termios.tcsetwinsize(self.workers_end, termios.tcgetwinsize(sys.stdout.fileno()))
        else:
            self._ours, self.workers_end = os.pipe()
        os.set_blocking(self._ours, False)

    def fileno(self) -> int:
        return self._ours

    def close_workers_end(self) -> None:
        """Closes this process's copy of the worker's end, once the worker has it: else the pipe would never end."""
        if self.workers_end >= 0:
            os.close(self.workers_end)
            self.workers_end = -1

    def forward(self) -> bool:
        """Forwards what the worker has written. False once there will be no more."""
        try:
            data = os.read(self._ours, 1 << 16)
        except BlockingIOError:
            return True
        except OSError:  # EIO: a pseudo-terminal whose other end is closed
            return False
        if self._shown:
            self._show(data)
        *lines, self._line = (self._line + data).split(b"\n")
        self._log_lines(lines)
        if len(self._line) > 1 << 16:  # a progress bar overwrites its line for hours without ending it
            self._line = self._line[self._line.rfind(b"\r", 0, -1) + 1 :]
        return bool(data)

    def add(self, lines: Sequence[str]) -> None:
        """Adds lines of our own to the log, about a worker that cannot write."""
        self._log_lines([line.encode() for line in lines])

    def drain(self) -> None:
        """Forwards all that has been written so far. It does not wait for the pipe's end: a process that a worker left
        behind may hold the pipe open."""
        while select.select([self._ours], [], [], 0)[0] and self.forward():
            pass

    def close(self) -> None:
        self.close_workers_end()
        os.close(self._ours)
        if self._line:
            self._log_lines([self._line])
        self._log.close()

    def _log_lines(self, lines: list[bytes]) -> None:
        if not lines:
            return
        plain = [_plain(line) for line in lines]
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3].encode() + b"Z "
        self.lines.extend(line.decode(errors="replace") for line in plain)
        if self.failure is None:
            try:
                self._log.write(b"".join(now + line + b"\n" for line in plain))
            except OSError as error:
                self.failure = refusal_of(error, self._path), time.monotonic()

    def _show(self, data: bytes) -> None:
        try:
            with _ignoring_closed_terminal(sys.stdout):
                show_utf8(data, self._decoder)
        except OSError as error:
            self._shown = False
            send_nowhere(sys.stdout)
            self.failure = self.failure or (refusal_of(error, Path("standard output")), time.monotonic())


def utf8_decoder() -> codecs.IncrementalDecoder:
    """For show_utf8: keeps the first bytes of a character that goes on in the next data."""
    return codecs.getincrementaldecoder("utf-8")("surrogateescape")


def show_utf8(data: bytes, decoder: codecs.IncrementalDecoder) -> None:
    """Writes UTF-8, as workers do in every locale, to our own output in its encoding."""
    if not hasattr(sys.stdout, "buffer"):  # a notebook's
        sys.stdout.write(data.decode(errors="replace"))
    else:
        if codecs.lookup(sys.stdout.encoding).name != "utf-8":
            data = decoder.decode(data).encode(sys.stdout.encoding, IN_ASCII)
        sys.stdout.buffer.write(data)
    sys.stdout.flush()


def say(message: str) -> None:
    """Prints on stdout at once; does nothing where the terminal or pipe behind it is closed."""
    with _ignoring_closed_terminal(sys.stdout):
        print(message, flush=True)


def tell(message: str) -> None:
    """Prints on stderr; does nothing where the terminal or pipe behind it is closed, or the file's disk is full."""
    try:
        with _ignoring_closed_terminal(sys.stderr):
            print(message, file=sys.stderr, flush=True)
    except OSError as error:
        if not is_full_disk(error):
            raise
        send_nowhere(sys.stderr)


@contextmanager
def _ignoring_closed_terminal(stream: TextIO) -> Iterator[None]:
    """Sends what is written to `stream` nowhere once its terminal or pipe is closed, so that this ends no run."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EPIPE):
            raise
        send_nowhere(stream)


def send_nowhere(stream: TextIO) -> None:
    """Sends what is written to `stream` from now on, and what waits in its buffer, nowhere."""
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _plain(line: bytes) -> bytes:
    """A line without control sequences, as it looked after its last carriage return."""
    return _CONTROL.sub(b"", line).rstrip(b"\r").rpartition(b"\r")[2]
