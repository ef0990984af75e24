"""The fixtures `run`, a run that has begun and was stopped, and `started`, the workers that a command would start."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.launch.processes import launcher
from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.recipes.recipe import resolve_recipe
from kilobatch.launch.runs import run_folder
from tests.helpers.begun_runs import SMALL, begun, images


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A run that has begun and been stopped at step 3, its images and its recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KILOBATCH_CACHE", str(tmp_path / "cache"))
    images("train.npz", 0)
    images("test.npz", 1)
    folder = begun(resolve_recipe("demo", SMALL))
    run_folder.set_status(folder, "interrupted", 1)
    return folder


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, kilobatch: Callable) -> list[list[str]]:
    """Notes the arguments of workers, which are not started."""
    noted: list[list[str]] = []

    def run_workers(
        folder: Path, workers: int, module: str, arguments: list[str], stall_minutes: float, question: object = None
    ) -> RunOutcome:
        noted.append(arguments)
        return RunOutcome("interrupted")

    monkeypatch.setattr(launcher, "run_workers", run_workers)
    return noted
