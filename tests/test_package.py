"""The package as others use it: imported by its one name, from folders that have files called as our folders are."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kilobatch
from tests.helpers.real_runs import TINY

# What a user's own folder may hold. Each says so when it is imported, and the test fails.
FOREIGN = [
    "data.py",
    "data/views.py",
    "data/__init__.py",
    "trainer.py",
    "methods/__init__.py",
    "launch.py",
    "configs.py",
]
FORKED = """
import multiprocessing
from kilobatch.trainer.ranks import spawn

if __name__ == "__main__":
    spawn._start_fork_server()
    child = multiprocessing.get_context("forkserver").Process(target=print)
    child.start()
    child.join()
    assert child.exitcode == 0, child.exitcode
"""
LAZY = """
import sys
import kilobatch
assert not {"torch", "numpy", "pydantic"} & sys.modules.keys(), "import kilobatch has loaded something heavy"
from kilobatch import nt_xent
from kilobatch.methods.losses.contrastive import nt_xent as where_it_stands
assert nt_xent is where_it_stands
"""


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    for name in FOREIGN:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"raise SystemExit('the user\\'s own {name} was imported')\n")
    return tmp_path


def python(folder: Path, *arguments: str) -> str:
    """Runs Python in the folder, which is the first on its path, and returns what it printed."""
    path = os.pathsep.join([str(folder), str(Path(kilobatch.__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_from_a_folder_with_a_data_py_of_its_own(foreign: Path) -> None:
    """Two workers, which are started in that folder, train, evaluate and leave a whole run."""
    python(foreign, "-c", "from kilobatch import Views, nt_xent, LARS")
    python(
        foreign, *["-m", "kilobatch", "train", *TINY, "data.batch=478", "schedule.epochs=3", "run.name=mine"],
        *["--workers", "2"],
    )  # fmt: skip
    assert '"finished"' in (foreign / "runs" / "mine" / "state.json").read_text()


def test_public_names_are_imported_when_they_are_asked_for(tmp_path: Path) -> None:
    python(tmp_path, "-c", LAZY)


@pytest.mark.parametrize("name", kilobatch.__all__)
def test_each_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(kilobatch, name).__doc__
    assert name in dir(kilobatch)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'kilobatch' has no attribute 'nothing'"):
        kilobatch.nothing  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    """They read the imports under TYPE_CHECKING; programs get what the table names."""
    file = Path(kilobatch.__file__)
    imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    seen = {
        name.asname: f"{node.module}".removeprefix("kilobatch.")
        for node in imports
        for name in node.names
        if name.asname
    }
    assert seen == kilobatch._MODULES


def test_modules_of_the_callers_folder_are_not_taken_for_pythons(tmp_path: Path) -> None:
    """`python -m kilobatch`, and the process from which ranks are forked."""
    for name in ("yaml", "typer", "selectors", "socket"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the caller')\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = str(Path(kilobatch.__file__).parents[1])
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(FORKED)
    for arguments in (["-m", "kilobatch", "recipes", "--schema"], [str(script)]):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
