"""Recordings of what commands print, in several surroundings: a text file for each subject.

WRITE_TRANSCRIPTS=1 python -m pytest tests/launch/cli/test_transcripts.py     writes them anew
"""

import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import unified_diff
from pathlib import Path
from typing import Any

import pytest

from kilobatch.launch.__main__ import main
from kilobatch.launch.processes import launcher
from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.processes.output import IN_ASCII, show_utf8, utf8_decoder
from kilobatch.launch.recipes.catalogue import FOLDER as CONFIGS
from tests.helpers import worker_in_process

SURROUNDINGS = {"100 columns": ("utf-8", 100), "100 columns, LC_ALL=C": ("ascii", 100), "40 columns": ("utf-8", 40)}
WIDE, C, NARROW = SURROUNDINGS
FOLDER = Path(__file__).parents[1] / "launch" / "cli" / "transcripts"


class _Workers(io.RawIOBase):
    """A worker's end of the pipe whose other end a launcher shows: takes UTF-8 in every locale."""

    def __init__(self, stdout: Any) -> None:
        self._stdout, self._decoder = stdout, utf8_decoder()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        with _streams(self._stdout, sys.stderr):
            show_utf8(bytes(data), self._decoder)
        return len(data)


def run_workers(*arguments: Any, **more: Any) -> RunOutcome:
    """Stands for launcher.run_workers with one worker, which is this process."""
    pipe = io.TextIOWrapper(io.BufferedWriter(_Workers(sys.stdout), 1), "utf-8", write_through=True)
    with _streams(pipe, pipe):
        return worker_in_process.run_workers(*arguments, **more)


@contextmanager
def _streams(stdout: Any, stderr: Any) -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = stdout, stderr
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def printed(call: Callable[[], object], where: str) -> str:
    """What a call prints to stdout and stderr, both into one file as a log would have it, where neither is a terminal:
    stdout is written when its buffer is full or flushed."""
    encoding, columns = SURROUNDINGS[where]
    file = io.BytesIO()
    out = io.TextIOWrapper(file, encoding, "surrogateescape")  # as Python opens them
    err = io.TextIOWrapper(file, encoding, "backslashreplace", write_through=True)
    with pytest.MonkeyPatch.context() as patch, _streams(out, err):
        patch.setenv("COLUMNS", str(columns))
        patch.setattr(launcher, "run_workers", run_workers)
        call()
        sys.stdout.flush()
    return file.getvalue().decode(encoding)


Mask = tuple[str, str | Callable[[re.Match[str]], str]]


@dataclass
class Session:
    """What one user types in a folder, and reads: commands and lines of Python, in their order."""

    where: str
    folder: Path
    masks: Sequence[Mask]
    typed: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # with what was printed
    names: dict[str, Any] = field(default_factory=dict[str, Any])  # Python's variables

    def command(self, line: str, *, terminal: bool = False) -> None:
        """A command line without `kilobatch`, as in a shell. A code that is not 0 is told. terminal: it prints as it
        does on a terminal without colours."""

        def call() -> None:
            try:
                main(shlex.split(line))
            except SystemExit as end:
                if end.code:
                    print(f"(exit code {end.code})")

        variables = {"TTY_COMPATIBLE": "1", "TERM": "dumb", "LINES": "25"} if terminal else {}
        self._type(f"$ kilobatch {line}", call, variables)

    def python(self, line: str) -> None:
        """A line of Python; an expression's value is printed as Python's own prompt does."""

        def call() -> None:
            try:
                exec(compile(line, "<stdin>", "single"), self.names)
            except Exception as error:
                sys.stdout.flush()
                print(f"{type(error).__name__}: {error}", file=sys.stderr)

        self._type(f">>> {line}", call, {})

    def _type(self, line: str, call: Callable[[], None], variables: Mapping[str, str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.chdir(self.folder)
            patch.setenv("KILOBATCH_CACHE", str(self.folder / "cache"))
            text = printed(call, self.where)
        text = text.replace(str(self.folder), "/here").replace(str(CONFIGS), "/configs")
        for pattern, by in self.masks:
            text = re.sub(pattern, by, text, flags=re.MULTILINE)
        self.typed.append((line, "".join(f"{line.rstrip()}\n" for line in text.splitlines())))


def recording(sessions: Mapping[str, Session]) -> str:
    """The text of a recording: each line that was typed, with what was printed in the first of SURROUNDINGS, and in
    others where that differs, but for characters that the locale lacks."""
    parts: list[str] = []
    for typed in zip(*(session.typed for session in sessions.values()), strict=True):
        (line,) = {line for line, _ in typed}
        texts = dict(zip(sessions, (text for _, text in typed), strict=True))
        common = texts[WIDE]
        parts.append(f"{line}\n{common}")
        parts += [f"=== {where}:\n{text}" for where, text in texts.items() if text not in (common, in_ascii(common))]
    return "\n".join(parts)


def in_ascii(text: str) -> str:
    return text.encode("ascii", IN_ASCII).decode()


def check_recording(name: str, sessions: Mapping[str, Session]) -> None:
    """Compares with the recording of this name, or writes it."""
    file, text = FOLDER / f"{name}.txt", recording(sessions)
    if os.environ.get("WRITE_TRANSCRIPTS"):
        file.write_text(text)
    other = "\n".join(unified_diff(file.read_text().splitlines(), text.splitlines(), str(file), "printed", lineterm=""))
    assert not other, other
