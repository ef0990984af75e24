"""Run folders and their states."""

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from kilobatch.data.errors import Refusal
from kilobatch.launch.runs import job_history as ledger
from kilobatch.launch.runs import run_folder as runs
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.launch.runs.run_folder import RunOptions
from kilobatch.launch.schedulers.scheduler import JobState

HOLDER = """
import sys, time
from pathlib import Path
from kilobatch.launch.runs import run_folder as runs
from kilobatch.launch.runs.job_history import JobFile
with runs.claimed(Path(sys.argv[1])):
    runs.set_status(Path(sys.argv[1]), "running", 2)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_each_run_has_its_own_folder():
    folders = [runs.create(RunOptions(), "demo", "run: {}\n", 2) for _ in range(5)]
    assert len(set(folders)) == 5
    for folder in folders:
        assert folder.name.startswith("demo-")
        assert folder.parent == Path("runs")
        assert (folder / "recipe.yaml").read_text() == "run: {}\n"
        assert runs.find(folder.name) == runs.find(str(folder)) == folder
        assert runs.status(folder) == "new"
        assert not list(folder.glob(".*"))


def test_a_name_is_taken_once_but_an_empty_folder_may_be_used():
    Path("runs/mine").mkdir(parents=True)
    folder = runs.create(RunOptions(name="mine"), "demo", "", 1)
    assert folder == Path("runs/mine")
    with pytest.raises(Refusal, match="run.name 'mine': runs/mine is not empty.*kilobatch resume runs/mine"):
        runs.create(RunOptions(name="mine"), "demo", "", 1)


def test_a_folder_that_cannot_be_written():
    Path("runs").write_text("a file")
    with pytest.raises(Refusal, match="run.folder 'runs'"):
        runs.create(RunOptions(), "demo", "", 1)


def test_state_keeps_when_it_started():
    folder = runs.create(RunOptions(), "demo", "", 2)
    first = runs.state(folder)
    runs.set_status(folder, "finished", 4)
    now = runs.state(folder)
    assert (now.status, now.workers, now.started) == ("finished", 4, first.started)
    assert now.updated >= first.updated
    assert runs.status(folder) == "finished"


def test_a_run_is_held_by_one_launcher_and_free_once_that_is_killed():
    folder = runs.create(RunOptions(), "demo", "", 2)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert runs.status(folder) == "running"
    with pytest.raises(Refusal, match=f"is running \\(process {holder.pid} on "), runs.claimed(folder):
        pass
    holder.kill()
    holder.communicate()
    assert runs.state(folder).status == "running"
    assert runs.status(folder) == "interrupted"
    with runs.claimed(folder):
        pass


def test_a_run_without_a_state_can_be_resumed():
    folder = runs.create(RunOptions(), "demo", "", 2)
    (folder / "state.json").unlink()
    assert runs.status(folder) == "interrupted"
    with pytest.raises(Refusal, match="state.json is missing"):
        runs.state(folder)


def test_of_a_submitted_run_the_scheduler_knows_what_its_folder_does_not():
    folder = runs.create(RunOptions(), "demo", "", 2)
    job = JobFile(cluster="slurm", job_id="7", submitted=ledger.now(), code="code/001")
    ledger.write_job_file(folder, job)
    runs.set_status(folder, "queued", 2)
    found = [runs.status(folder, JobState(state)) for state in ("queued", "running", "ending", "cancelled", "gone")]
    assert found == ["queued", "running", "running", "cancelled", "interrupted"]
    (folder / "cancelled").touch()
    assert runs.status(folder, JobState("gone")) == "cancelled"
    runs.set_status(folder, "finished", 2)
    assert runs.status(folder, JobState("ending")) == "finished"


def test_a_file_system_without_locks(monkeypatch: pytest.MonkeyPatch):
    folder = runs.create(RunOptions(), "demo", "", 2)

    def none(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with runs.claimed(folder):
        pass
