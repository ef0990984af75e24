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


WAIT = """
from kilobatch.data import loop
from kilobatch.data.numba_jit import first_call
print("ready", flush=True)
input()
with first_call(loop.twice):
    loop.twice(1)
print(sum(loop.twice.stats.cache_hits.values()))
"""


def copy_package(package: Path) -> None:
    """Copies the files that a compiled loop needs, and writes one."""
    (package / "data").mkdir(parents=True)
    for name in ("__init__.py", "data/__init__.py", "data/errors.py", "data/files.py", "data/numba_jit.py"):
        shutil.copy(Path(kilobatch.__file__).parent / name, package / name)
    (package / "data" / "loop.py").write_text(LOOP)


def variables(cache: Path) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA")}
    return environment | {"KILOBATCH_CACHE": str(cache), "PYTHONSAFEPATH": "1"}


def test_processes_that_begin_together_compile_once(tmp_path: Path):
    copy_package(tmp_path / "kilobatch")
    environment = variables(tmp_path / "cache") | {"PYTHONPATH": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", WAIT], stdin=-1, stdout=-1, stderr=-1, text=True, env=environment)
        for _ in range(3)
    ]
    assert [process.stdout and process.stdout.readline() for process in started] == ["ready\n"] * 3
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=120) for process in started]
    assert sorted(hits.strip() for hits, _ in ended) == ["0", "1", "1"], ended
    assert "compiling the loader's loops for this machine, once" in "".join(said for _, said in ended)
    again = subprocess.run([sys.executable, "-c", WAIT], input="\n", capture_output=True, text=True, env=environment)
    assert (again.stdout, again.stderr) == ("ready\n1\n", "")


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path):
    copy_package(tmp_path / "kilobatch")
    (tmp_path / "cache").write_text("a file")
    environment = variables(tmp_path / "cache") | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", WAIT], input="\n", capture_output=True, text=True, env=environment)
    assert ended.stdout == "ready\n0\n", ended.stderr


def test_a_copy_of_these_files_is_not_compiled_anew(tmp_path: Path):
    for copy in ("first", "second"):
        copy_package(tmp_path / copy / "kilobatch")
    environment = variables(tmp_path / "cache")

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
