"""Copies the code into the run folder when a job is submitted; the job runs that copy. Loads no torch."""

import json
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kilobatch
from kilobatch.data.errors import UserError
from kilobatch.data.files import describe_os_error, write_whole

PACKAGE = Path(kilobatch.__file__).parent
FOLDERS = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")
CHECKOUT = Path(__file__).resolve().parents[2]


def check_path(folder: Path) -> None:
    """Raises UserError for a run's folder with characters in its path that PYTHONPATH or SLURM would misread."""
    if special := re.search(r"[:%\\\n]", str(folder.absolute())):
        raise UserError(
            f"{folder.absolute()}: '{special[0]}' means something to Python or SLURM; use a path without it"
        )


def take_snapshot(codes: Path) -> Path:
    """Copies the package, with the commit in commit.json, into the next free one of `codes/001`, `codes/002`, … Returns
    that folder. Raises UserError where it cannot be written."""
    numbers = [int(path.name) for path in codes.glob("[0-9]*") if path.name.isdecimal()]
    code = codes / f"{max(numbers, default=0) + 1:03d}"
    partial = codes / f".{code.name}"
    try:
        if partial.exists():  # left by a submission that was killed
            shutil.rmtree(partial)
        shutil.copytree(PACKAGE, partial / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        write_whole(partial / "commit.json", [json.dumps(_commit(), indent=1).encode()])
        partial.rename(code)
    except OSError as error:
        raise UserError(f"the code cannot be copied to {code}: {describe_os_error(error)}") from error
    return code


def _commit() -> dict[str, Any]:
    """The checkout's commit, and the files that differ from it: the copy holds them as they are, committed or not."""
    note = {"taken": datetime.now(UTC).isoformat(timespec="seconds")}
    if shutil.which("git") is None or not (CHECKOUT / ".git").exists():
        return note | {"commit": None}
    changed = _git("status", "--porcelain", "--", "src", *FOLDERS).splitlines()
    return note | {"commit": _git("rev-parse", "HEAD").strip(), "changed": changed}


def _git(*arguments: str) -> str:
    """What a git command prints. Nothing where git refuses, as in a checkout that belongs to another user."""
    done = subprocess.run(["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout
