"""Rank 0's output, as the terminal sees it and as the log keeps it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.echo import Echo

LAUNCHER = """
import subprocess, sys
from pathlib import Path
from launch.echo import Echo
with Echo.to_this_terminal(Path(sys.argv[1])) as echo:
    worker = "import os; print(os.isatty(1), end=''); print('\\\\r\\\\x1b[2Kstep \\\\x1b[1m7\\\\x1b[0m', end='')"
    subprocess.run([sys.executable, "-c", worker], stdout=echo.workers_end, check=True)
    echo.opened()
    echo.drain()
"""


def test_log_keeps_plain_whole_lines(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]):
    written = b"a\x1b[31mb\x1b[0m\r\nstep 1\rstep 2\r\x1b[2Kstep 3\nlast"
    with Echo.to_this_terminal(tmp_path / "log") as echo:
        os.write(echo.workers_end, written[:9])
        assert echo.forward()
        assert (tmp_path / "log").read_bytes() == b""  # no whole line yet
        os.write(echo.workers_end, written[9:])
        echo.drain()
        assert (tmp_path / "log").read_bytes() == b"ab\nstep 3\n"
        echo.opened()
        assert not echo.forward()
    assert (tmp_path / "log").read_bytes() == b"ab\nstep 3\nlast\n"
    assert capfdbinary.readouterr().out == written


def test_on_a_terminal_the_worker_has_one_too(tmp_path: Path):
    ours, theirs = os.openpty()
    subprocess.run([sys.executable, "-c", LAUNCHER, str(tmp_path / "log")], stdout=theirs, check=True)
    os.close(theirs)
    assert os.read(ours, 1000) == b"True\r\x1b[2Kstep \x1b[1m7\x1b[0m"
    os.close(ours)
    assert (tmp_path / "log").read_text() == "step 7\n"


@pytest.mark.parametrize("make", [os.openpty, os.pipe])
def test_a_vanished_terminal_or_pipe_ends_nothing(make: Callable[[], tuple[int, int]], tmp_path: Path):
    ours, theirs = make()
    slow = LAUNCHER.replace("    worker =", "    input()\n    worker =", 1)
    command = [sys.executable, "-c", slow, str(tmp_path / "log")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=theirs, stderr=subprocess.PIPE, text=True) as process:
        os.close(theirs)
        while not (tmp_path / "log").exists():
            time.sleep(0.02)
        os.close(ours)
        _, err = process.communicate("\n", timeout=60)
    assert (process.returncode, err) == (0, "")
    assert (tmp_path / "log").read_text() == "step 7\n"
