"""Variables with which another Python process imports this project, and nothing from the folder it is started in."""

import os
import site
from pathlib import Path

import kilobatch

PACKAGE = Path(kilobatch.__file__).parent


def import_variables(code: Path | None = None) -> dict[str, str]:
    """PYTHONSAFEPATH, and PYTHONPATH with the folder of the package first.

    code: the folder that holds the package, such as a snapshot; None: the one from which this process has it. The
    caller's own PYTHONPATH follows, without empty and relative entries: they stand for the folder that a process is
    started in, whose `random.py` or `numpy/` would be taken for Python's own or for an installed package.
    """
    first = [] if code is None and str(PACKAGE.parent) in _installed() else [str((code or PACKAGE.parent).absolute())]
    return {"PYTHONPATH": os.pathsep.join([*first, *_absolute_entries()]), "PYTHONSAFEPATH": "1"}


def _absolute_entries() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if Path(entry).is_absolute()]


def _installed() -> list[str]:
    """The folders of installed packages, which must not come before Python's own modules."""
    return [*site.getsitepackages(), site.getusersitepackages()]
