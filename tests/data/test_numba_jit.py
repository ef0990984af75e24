"""Compiled code is reused by copies of the same files at any path."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kilobatch
from kilobatch.data.numba_jit import DATA_FOLDER, FILES_OF_CONSTANTS

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


def test_files_whose_constants_are_compiled_in_count_for_the_cache():
    """A constant is compiled into the loops of the files that import it, so its own file must change the cache's
    folder as well."""
    compiled = {path for path in DATA_FOLDER.rglob("*.py") if "kilobatch.data.numba_jit" in path.read_text()}
    counted = compiled | {DATA_FOLDER / name for name in ("numba_jit.py", *FILES_OF_CONSTANTS)}
    imports = [node for path in compiled for node in ast.walk(ast.parse(path.read_text()))]
    constants = {
        DATA_FOLDER.joinpath(*node.module.split(".")[2:]).with_suffix(".py")
        for node in imports
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kilobatch.data.")
        if any(name.name.isupper() for name in node.names)
    }
    assert constants and constants <= counted, constants - counted
