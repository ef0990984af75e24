"""Sources are opened by the launcher alone: it names the .beton files to its workers, which open no source."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from kilobatch.data.beton import verify_beton
from kilobatch.launch.jobs.attempt import run_attempt
from kilobatch.launch.jobs.signals import Signals
from kilobatch.launch.nodes import agent
from kilobatch.launch.processes import launcher
from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.recipes.data import PreparedData
from kilobatch.launch.recipes.recipe import load_recipe
from kilobatch.launch.runs import job_history
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.launch.schedulers.local import Local
from kilobatch.launch.schedulers.scheduler import Task
from tests.helpers.own_cache import own_cache

SMALL = ["demo", "data.train=npz:photos.npz", "data.test=npz:photos.npz", "data.batch=4", "data.views.size=8"]
SMALL += ["encoder.width=2", "schedule.epochs=1", "schedule.warmup_epochs=0", "evaluate.every_epochs=0"]
SMALL += ["evaluate.final=[]", "run.name=r", "data.threads=1"]


@dataclass
class Workers:
    """Notes the arguments that workers would be started with."""

    arguments: list[list[str]] = field(default_factory=list)
    outcome: RunOutcome = RunOutcome("interrupted")

    def run(
        self,
        folder: Path,
        workers: int,
        module: str,
        arguments: list[str],
        stall_minutes: float,
        question: object = None,
    ) -> RunOutcome:
        self.arguments.append(arguments)
        return self.outcome

    def data(self) -> PreparedData:
        """What the last ones were told."""
        last = self.arguments[-1]
        return PreparedData.model_validate_json(last[last.index("--data") + 1])


@pytest.fixture
def workers(kilobatch: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Workers:
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "photos.npz", images=images, labels=np.arange(8) % 2)
    noted = Workers()
    monkeypatch.setattr(launcher, "run_workers", noted.run)
    return noted


@pytest.fixture
def job_signals() -> Iterator[Signals]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT)}
    yield Signals()
    for number, handler in before.items():
        signal.signal(number, handler)


def check_data(data: PreparedData, cache: Path) -> None:
    assert data.test is not None
    for file in (data.train, data.test):
        assert file.beton.is_absolute() and file.beton.parent == cache
        assert verify_beton(file.beton).sha256 == file.sha256


def test_every_road_names_the_files(
    kilobatch: Callable, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache = tmp_path / "cache"
    assert kilobatch("train", *SMALL).code == 130
    check_data(workers.data(), cache)
    trained = workers.data()
    (tmp_path / "runs" / "r" / "checkpoints" / "step-00000001").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = str(tmp_path / "runs" / "r")
    assert kilobatch("resume", run).code == 130
    assert workers.data() == trained
    np.savez("other.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=[0, 0])
    assert kilobatch("eval", run, "--knn", "--test", "npz:other.npz", "evaluate.knn.k=3").code == 130
    assert "evaluate.knn.k=3" in workers.arguments[-1]
    check_data(workers.data(), cache)
    assert workers.data().train == trained.train and workers.data().test != trained.test
    # An evaluation writes nothing of it into the run, in which a training may be running.
    assert sorted(path.name for path in Path(run).iterdir()) == [
        ".lock", "checkpoints", "logs", "pictures", "recipe.yaml", "state.json",
    ]  # fmt: skip


def test_a_job_names_the_files(
    kilobatch: Callable, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job_signals: Signals
):
    """To the workers of node 0, which prepares the data; rank 0 tells the others."""
    assert kilobatch("train", *SMALL).code == 130
    folder = tmp_path / "runs" / "r"
    job = JobFile(cluster="local", job_id="1", nodes=2, submitted=job_history.utc_now(), code="code/001")
    job_history.write_job_file(folder, job)

    def run_node(*arguments: object, prepare: Callable[[], list[str]], **options: object) -> RunOutcome:
        workers.arguments.append(prepare())
        return RunOutcome("finished")

    monkeypatch.setattr(agent, "run_node", run_node)
    for node in (1, 0):
        run_attempt(folder, Task("1", 0, node, 2, ["n0", "n1"]), Local(), job_signals)
    assert workers.arguments[-2] == []
    check_data(workers.data(), tmp_path / "cache")


def test_runs_keep_absolute_paths(kilobatch: Callable, workers: Workers, tmp_path: Path):
    assert kilobatch("train", *SMALL).code == 130
    data = load_recipe(tmp_path / "runs" / "r" / "recipe.yaml")[0].data
    assert data.train == data.test == f"npz:{tmp_path}/photos.npz"


def test_workers_open_no_source(kilobatch: Callable, workers: Workers, tmp_path: Path):
    """The file is gone when the two workers start."""
    assert kilobatch("train", *SMALL).code == 130
    (tmp_path / "photos.npz").unlink()
    (tmp_path / "cache").rename(tmp_path / "shared")
    arguments = [text.replace(f"{tmp_path}/cache", f"{tmp_path}/shared") for text in workers.arguments[-1]]
    outcome = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "KILOBATCH_CACHE": own_cache(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert outcome.stdout.splitlines()[-1] == "finished", outcome.stdout + outcome.stderr


RUN = """
import sys
from pathlib import Path
from kilobatch.launch.processes.launcher import run_workers
print(run_workers(Path(sys.argv[1]), 2, "kilobatch.launch.worker.main", sys.argv[1:]).kind)
"""
