"""Compiled code is kept for whoever has the same files, wherever they lie."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import data

LOOP = """
from data.compiled import exact

@exact
def twice(x):
    return 2 * x
"""
USE = """
from data import loop
loop.twice(1)
print(loop.__file__, sum(loop.twice.stats.cache_hits.values()))
"""


def test_a_copy_of_these_files_is_not_compiled_anew(tmp_path: Path):
    for copy in ("first", "second"):
        (tmp_path / copy / "data").mkdir(parents=True)
        for name in ("__init__.py", "compiled.py"):
            shutil.copy(Path(data.__file__).parent / name, tmp_path / copy / "data" / name)
        (tmp_path / copy / "data" / "loop.py").write_text(LOOP)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA")}
    environment |= {"KILOBATCH_CACHE": str(tmp_path / "cache"), "PYTHONSAFEPATH": "1"}

    def used(copy: str) -> str:
        path = {"PYTHONPATH": str(tmp_path / copy)}
        command = [sys.executable, "-c", USE]
        return subprocess.run(command, env=environment | path, capture_output=True, text=True, check=True).stdout

    assert used("first") == f"{tmp_path}/first/data/loop.py 0\n"
    assert used("second") == f"{tmp_path}/second/data/loop.py 1\n"
    with (tmp_path / "second" / "data" / "loop.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    assert used("second") == f"{tmp_path}/second/data/loop.py 0\n"
