"""The output of a command: in a process of its own, without a terminal, in a narrow one's width and in ASCII alone."""

import os
import subprocess
import sys
from pathlib import Path

import kilobatch

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def transcript(folder: Path, *arguments: str, columns: int = 40) -> tuple[int, str]:
    """The exit code, and stdout and stderr as a log would hold them, both in one."""
    environment = os.environ | ASCII | {"COLUMNS": str(columns)}
    done = subprocess.run(
        [sys.executable, "-m", "kilobatch", *arguments],
        cwd=folder,
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, [source(), os.environ.get("PYTHONPATH")]))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout.decode("ascii")


def source() -> str:
    return str(Path(kilobatch.__file__).parents[1])
