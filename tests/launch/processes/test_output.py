"""A worker's output, as the terminal sees it and as the log keeps it."""

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.launch.processes.output import WorkerOutput

LAUNCHER = """
import subprocess, sys
from pathlib import Path
from kilobatch.launch.processes.output import WorkerOutput
output = WorkerOutput(Path(sys.argv[1]), shown=True)
worker = "import os; print(os.isatty(1), end=''); print('\\\\r\\\\x1b[2Kstep \\\\x1b[1m7\\\\x1b[0m', end='')"
subprocess.run([sys.executable, "-c", worker], stdout=output.workers_end, check=True)
output.close_workers_end()
output.drain()
output.close()
"""


def kept(log: Path) -> list[str]:
    """The log's lines without their times."""
    lines = log.read_text().splitlines()
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ", line[:25]) for line in lines)
    return [line[25:] for line in lines]


def test_log_keeps_plain_whole_lines(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]):
    written = b"a\x1b[31mb\x1b[0m\r\nstep 1\rstep 2\r\x1b[2Kstep 3\nlast"
    output = WorkerOutput(tmp_path / "log", shown=True)
    os.write(output.workers_end, written[:9])
    assert output.forward()
    assert kept(tmp_path / "log") == []  # no whole line yet
    os.write(output.workers_end, written[9:])
    output.drain()
    assert kept(tmp_path / "log") == list(output.lines) == ["ab", "step 3"]
    output.close_workers_end()
    assert not output.forward()
    output.close()
    assert kept(tmp_path / "log") == ["ab", "step 3", "last"]
    assert capfdbinary.readouterr().out == written


def test_in_a_locale_that_lacks_characters_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A worker writes UTF-8 everywhere; its terminal shows it in its own characters, the log keeps it."""
    text, shown = "2 × 3 … – ± µs\n┃ größer │\n┡━━╇━╸\n", io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    output = WorkerOutput(tmp_path / "log", shown=True)
    for byte in text.encode():  # so that characters come in pieces
        os.write(output.workers_end, bytes([byte]))
        output.drain()
    output.close()
    assert shown.getvalue().decode("ascii") == "2 x 3 ... - +- us\n| gr\\xf6\\xdfer |\n+--+--\n"
    assert kept(tmp_path / "log") == text.splitlines()


def test_what_is_not_shown_stands_in_the_log_alone(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]):
    output = WorkerOutput(tmp_path / "log", shown=False)
    os.write(output.workers_end, b"rank 1\n")
    output.drain()
    output.close()
    assert kept(tmp_path / "log") == ["rank 1"]
    assert capfdbinary.readouterr().out == b""


def test_a_bar_that_never_ends_its_line_is_not_remembered(tmp_path: Path):
    output = WorkerOutput(tmp_path / "log", shown=False)
    for step in range(300):
        os.write(output.workers_end, b"\r" + f"step {step} ".encode() + 1000 * b"=")
        output.drain()
    assert len(output._line) < 1 << 17
    os.write(output.workers_end, b"\n")
    output.drain()
    output.close()
    assert kept(tmp_path / "log") == ["step 299 " + 1000 * "="]


def test_on_a_terminal_the_worker_has_one_too(tmp_path: Path):
    ours, theirs = os.openpty()
    subprocess.run([sys.executable, "-c", LAUNCHER, str(tmp_path / "log")], stdout=theirs, check=True)
    os.close(theirs)
    assert os.read(ours, 1000) == b"True\r\x1b[2Kstep \x1b[1m7\x1b[0m"
    os.close(ours)
    assert kept(tmp_path / "log") == ["step 7"]


@pytest.mark.parametrize("make", [os.openpty, os.pipe])
def test_a_vanished_terminal_or_pipe_ends_nothing(make: Callable[[], tuple[int, int]], tmp_path: Path):
    ours, theirs = make()
    slow = LAUNCHER.replace("worker =", "input()\nworker =", 1)
    command = [sys.executable, "-c", slow, str(tmp_path / "log")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=theirs, stderr=subprocess.PIPE, text=True) as process:
        os.close(theirs)
        while not (tmp_path / "log").exists():
            assert process.poll() is None
            time.sleep(0.02)
        os.close(ours)
        _, err = process.communicate("\n", timeout=60)
    assert (process.returncode, err) == (0, "")
    assert kept(tmp_path / "log") == ["step 7"]
