"""Run folders and their states."""

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from kilobatch.data.errors import UserError
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.launch.runs.overview import overview
from kilobatch.launch.runs.run_folder import RunOptions
from kilobatch.launch.schedulers.scheduler import JobState

HOLDER = """
import sys, time
from pathlib import Path
from kilobatch.launch.runs import run_folder
from kilobatch.launch.runs.job_history import JobFile
with run_folder.locked(Path(sys.argv[1])):
    run_folder.set_status(Path(sys.argv[1]), "running", 2)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_each_run_has_its_own_folder():
    folders = [run_folder.create_run(RunOptions(), "demo", "run: {}\n", 2) for _ in range(5)]
    assert len(set(folders)) == 5
    for folder in folders:
        assert folder.name.startswith("demo-")
        assert folder.parent == Path("runs")
        assert (folder / "recipe.yaml").read_text() == "run: {}\n"
        assert run_folder.find_run(folder.name) == run_folder.find_run(str(folder)) == folder
        assert run_folder.status(folder) == "new"
        assert not list(folder.glob(".*"))


def test_a_name_is_taken_once_but_an_empty_folder_may_be_used():
    Path("runs/mine").mkdir(parents=True)
    folder = run_folder.create_run(RunOptions(name="mine"), "demo", "", 1)
    assert folder == Path("runs/mine")
    with pytest.raises(UserError, match="run.name 'mine': runs/mine is not empty.*kilobatch resume runs/mine"):
        run_folder.create_run(RunOptions(name="mine"), "demo", "", 1)


def test_a_folder_that_cannot_be_written():
    Path("runs").write_text("a file")
    with pytest.raises(UserError, match="run.folder 'runs'"):
        run_folder.create_run(RunOptions(), "demo", "", 1)


def test_state_keeps_when_it_started():
    folder = run_folder.create_run(RunOptions(), "demo", "", 2)
    first = run_folder.read_state(folder)
    run_folder.set_status(folder, "finished", 4)
    now = run_folder.read_state(folder)
    assert (now.status, now.workers, now.started) == ("finished", 4, first.started)
    assert now.updated >= first.updated
    assert run_folder.status(folder) == "finished"


def test_a_run_is_locked_by_one_launcher_until_that_is_killed():
    folder = run_folder.create_run(RunOptions(), "demo", "", 2)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert run_folder.status(folder) == "running"
    with pytest.raises(UserError, match=f"is running \\(process {holder.pid} on "), run_folder.locked(folder):
        pass
    holder.kill()
    holder.communicate()
    assert run_folder.read_state(folder).status == "running"
    assert run_folder.status(folder) == "interrupted"
    with run_folder.locked(folder):
        pass


def test_a_run_without_a_state_can_be_resumed():
    folder = run_folder.create_run(RunOptions(), "demo", "", 2)
    (folder / "state.json").unlink()
    assert run_folder.status(folder) == "interrupted"
    with pytest.raises(UserError, match="state.json is missing"):
        run_folder.read_state(folder)


def test_a_damaged_state_is_refused():
    folder = run_folder.create_run(RunOptions(), "demo", "", 2)
    (folder / "state.json").write_text('{"status": "new", "pid": "x"}')
    with pytest.raises(UserError) as refusal:
        run_folder.read_state(folder)
    problem = "Input should be a valid integer, unable to parse string as an integer"
    assert str(refusal.value) == f"{folder}/state.json is damaged ({problem}); remove it and give --workers to resume"


def test_status_of_a_submitted_run_comes_from_the_scheduler():
    folder = run_folder.create_run(RunOptions(), "demo", "", 2)
    job = JobFile(cluster="slurm", job_id="7", submitted=job_history.utc_now(), code="code/001")
    job_history.write_job_file(folder, job)
    run_folder.set_status(folder, "queued", 2)
    found = [
        run_folder.status(folder, JobState(state)) for state in ("queued", "running", "ending", "cancelled", "gone")
    ]
    assert found == ["queued", "running", "running", "cancelled", "interrupted"]
    (folder / "cancelled").touch()
    assert run_folder.status(folder, JobState("gone")) == "cancelled"
    run_folder.set_status(folder, "finished", 2)
    assert run_folder.status(folder, JobState("ending")) == "finished"


def test_a_run_that_leaves_its_job_is_not_what_became_of_that():
    """One that was cancelled, and goes on without a job."""
    folder = run_folder.create_run(RunOptions(), "demo", "run: {}\n", 2)
    job = JobFile(cluster="slurm", job_id="7", submitted=job_history.utc_now(), code="code/001", earlier=["5"])
    job_history.write_job_file(folder, job)
    (folder / "cancelled").touch()
    job_history.leave_job(folder)
    assert job_history.read_job_file(folder) == job.model_copy(update={"job_id": "", "earlier": ["5", "7"]})
    with run_folder.locked(folder):
        run_folder.set_status(folder, "running", 2)
        assert run_folder.status(folder) == overview([str(folder)]).rows[0].state == "running"
    assert run_folder.status(folder) == overview([str(folder)]).rows[0].state == "interrupted"


def test_a_file_system_without_locks(monkeypatch: pytest.MonkeyPatch):
    folder = run_folder.create_run(RunOptions(), "demo", "", 2)

    def none(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with run_folder.locked(folder):
        pass
