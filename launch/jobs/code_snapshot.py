"""The code that a job runs: what the checkout was when it was submitted, kept in the run folder. Loads no torch."""

import json
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kilobatch
from kilobatch.data.errors import Refusal
from kilobatch.data.files import in_words, write_whole

PACKAGE = Path(kilobatch.__file__).parent
FOLDERS = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")
CHECKOUT = Path(__file__).resolve().parents[2]


def refuse_odd(folder: Path) -> None:
    """Raises Refusal for a run's folder that PYTHONPATH or SLURM would take for another."""
    if odd := re.search(r"[:%\\\n]", str(folder.absolute())):
        raise Refusal(f"{folder.absolute()}: '{odd[0]}' means something to Python or SLURM; use a path without it")


def take(codes: Path) -> Path:
    """Copies the package into the next free `codes/001`, with a note of the commit, and returns that folder.

    Raises Refusal where it cannot be written.
    """
    taken = [int(path.name) for path in codes.glob("[0-9]*") if path.name.isdecimal()]
    code = codes / f"{max(taken, default=0) + 1:03d}"
    beside = codes / f".{code.name}"
    try:
        if beside.exists():  # of a submission that was killed
            shutil.rmtree(beside)
        shutil.copytree(PACKAGE, beside / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        write_whole(beside / "commit.json", [json.dumps(_commit(), indent=1).encode()])
        beside.rename(code)
    except OSError as error:
        raise Refusal(f"the code cannot be copied to {code}: {in_words(error)}") from error
    return code


def _commit() -> dict[str, Any]:
    """What git says of the checkout; the copy itself holds whatever was not committed."""
    taken = {"taken": datetime.now(UTC).isoformat(timespec="seconds")}
    if shutil.which("git") is None or not (CHECKOUT / ".git").exists():
        return taken | {"commit": None}
    changed = _git("status", "--porcelain", "--", "src", *FOLDERS).splitlines()
    return taken | {"commit": _git("rev-parse", "HEAD").strip(), "changed": changed}


def _git(*arguments: str) -> str:
    """Empty where git refuses, as it does in a checkout that belongs to someone else."""
    said = subprocess.run(["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True, check=False)
    return said.stdout
