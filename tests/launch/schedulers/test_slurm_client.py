"""The output of SLURM's commands, as the client reads it. The commands themselves: tests/slurm/."""

from pathlib import Path

import pytest

from kilobatch.data.errors import UserError
from kilobatch.launch.schedulers import slurm
from kilobatch.launch.schedulers.scheduler import JobState
from kilobatch.launch.schedulers.slurm import Slurm


@pytest.mark.parametrize(
    ("left", "seconds"),
    [("9:56", 596), ("1:00:03", 3603), ("2-01:00:00", 176400), ("0:00", 0), ("UNLIMITED", None), ("INVALID", None)],
)
def test_time_left(left: str, seconds: float | None):
    assert slurm._seconds(left) == seconds


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for programs that stand in for SLURM's, as where the controller or the database is in trouble."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def program(folder: Path, name: str, lines: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
    (folder / name).chmod(0o755)


def test_jobs_that_squeue_does_not_list_are_looked_up_by_sacct(commands: Path):
    program(commands, "squeue", "echo '3|RUNNING|n[0-2]|1:00|None'; echo '4_1|PENDING||2:00|Priority, or (Resources)'")
    program(commands, "sacct", "echo '5|CANCELLED by 1000'; echo '6|COMPLETED'; echo '7|RUNNING'")
    assert Slurm().states(["3", "4_1", "5", "6", "7", "", "8"]) == {
        "3": JobState("running", "RUNNING", nodes="n[0-2]", seconds_left=60),
        "4_1": JobState("queued", "PENDING", why="Priority, or (Resources)", seconds_left=120),
        "5": JobState("cancelled", "CANCELLED by 1000"),
        "6": JobState("finished", "COMPLETED"),
        "7": JobState("gone"),
        "": JobState("gone"),
        "8": JobState("gone"),
    }


@pytest.mark.parametrize("trouble", ["echo 'Slurm accounting storage is disabled' >&2; exit 1", "sleep 30"])
def test_without_accounting_they_are_gone(commands: Path, trouble: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slurm, "ANSWER_TIMEOUT", 0.5)
    program(commands, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    program(commands, "sacct", f"exec {trouble}" if trouble.startswith("sleep") else trouble)
    assert Slurm().states(["5"]) == {"5": JobState("gone")}


def test_no_jobs_no_call(commands: Path):
    assert Slurm().states([]) == {}
    Slurm().cancel([])


def test_a_controller_that_does_not_answer(commands: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slurm, "ANSWER_TIMEOUT", 0.2)
    program(commands, "squeue", "exec sleep 30")
    with pytest.raises(UserError, match="SLURM does not answer: squeue"):
        Slurm().states(["5"])
    (commands / "squeue").unlink()
    monkeypatch.setenv("PATH", str(commands))
    with pytest.raises(UserError, match="there is no squeue here"):
        Slurm().states(["5"])


def test_a_job_repeats_its_request_while_the_controller_restarts(commands: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slurm, "RETRY_PAUSE", 0.05)
    program(
        commands,
        "scontrol",
        f"echo x >> {commands}/tries; [ $(wc -l < {commands}/tries) -ge 3 ] && exit 0\n"
        "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1",
    )
    Slurm().requeue("5")
    assert (commands / "tries").read_text() == "x\n" * 3
    program(commands, "scontrol", "echo 'Requested operation is presently disabled for job 5' >&2; exit 1")
    with pytest.raises(UserError, match="scontrol requeue: Requested operation is presently disabled for job 5"):
        Slurm().requeue("5")
