"""Compiled code is reused by copies of the same files at any path."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import kilobatch

LOOP = """
from kilobatch.data.numba_jit import exact

@exact
def twice(x):
    return 2 * x
"""
USE = """
from kilobatch.data import loop
loop.twice(1)
print(loop.__file__, sum(loop.twice.stats.cache_hits.values()))
"""


def test_a_copy_of_these_files_is_not_compiled_anew(tmp_path: Path):
    for copy in ("first", "second"):
        package = tmp_path / copy / "kilobatch"
        (package / "data").mkdir(parents=True)
        for name in ("__init__.py", "data/__init__.py", "data/errors.py", "data/files.py", "data/numba_jit.py"):
            shutil.copy(Path(kilobatch.__file__).parent / name, package / name)
        (package / "data" / "loop.py").write_text(LOOP)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA")}
    environment |= {"KILOBATCH_CACHE": str(tmp_path / "cache"), "PYTHONSAFEPATH": "1"}

    def used(copy: str) -> str:
        path = {"PYTHONPATH": str(tmp_path / copy)}
        command = [sys.executable, "-c", USE]
        return subprocess.run(command, env=environment | path, capture_output=True, text=True, check=True).stdout

    assert used("first") == f"{tmp_path}/first/kilobatch/data/loop.py 0\n"
    assert used("second") == f"{tmp_path}/second/kilobatch/data/loop.py 1\n"
    with (tmp_path / "second" / "kilobatch" / "data" / "loop.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    assert used("second") == f"{tmp_path}/second/kilobatch/data/loop.py 0\n"
