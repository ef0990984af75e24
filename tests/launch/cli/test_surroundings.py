"""Commands whose standard streams are closed or end early, and whose locale has no character but ASCII's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kilobatch

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "40"}


def code_of(command: str, end: str, folder: Path, **variables: str) -> int:
    """The exit code of a command in bash. end: where its output goes. It fails where stderr has a traceback."""
    path = str(Path(kilobatch.__file__).parents[1])
    script = f"exec 3>code 2>errors; {sys.executable} -m kilobatch {command} {end}; echo ${{PIPESTATUS[0]}} >&3"
    environment = os.environ | {"PYTHONPATH": path} | variables
    subprocess.run(["bash", "-c", script], cwd=folder, env=environment, check=True, stdin=subprocess.DEVNULL)
    assert "Traceback" not in (folder / "errors").read_text() and "Exception" not in (folder / "errors").read_text()
    return int((folder / "code").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streams")


@pytest.mark.parametrize("end", ["| true", "| head -n 1 > /dev/null", ">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["recipes", "recipes --schema"])
def test_a_reader_that_ends_is_no_error(command: str, end: str, folder: Path) -> None:
    assert code_of(command, end, folder) == 0


def test_a_refusal_stays_one(folder: Path) -> None:
    assert code_of("status nothing", "| true", folder) == 2


@pytest.mark.parametrize("command", ["status", "recipes", "train --help"])
def test_a_locale_of_ascii_alone(command: str, folder: Path) -> None:
    assert code_of(command, "> out", folder, **ASCII) == 0
    assert (folder / "out").read_bytes().isascii()
