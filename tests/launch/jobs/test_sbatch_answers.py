"""Submissions whose answers are lost, and the environment that sbatch gets."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.schedulers import slurm
from tests.launch.conftest import CommandResult

SUBMITTED = ["demo", "data.batch=480", "--time", "1:00:00", "--workers-per-node", "4", "--name", "mine"]
SBATCH = """#!/bin/sh
env > $HOME/got
case $1 in /*) echo "7|$1" > $HOME/queue;; esac
test -e $HOME/refuses && echo "sbatch: error: Invalid account" >&2 && exit 1
test -e $HOME/answers && echo "Submitted batch job 7" && exit
echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1
"""


SQUEUE = """#!/bin/sh
case "$*" in *%o*) cat $HOME/queue;; *) sed 's/|.*/|PENDING||1:00|None/' $HOME/queue;; esac
"""
SILENT = "#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n"


@pytest.fixture
def scheduler(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an sbatch that writes down its environment, takes the job, and answers where `answers` is; and with
    a squeue that lists the job. Returns the home folder, which has these files."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "RETRY_PAUSE", 0.1)
    monkeypatch.setattr(slurm, "COMMAND_RETRY_FOR", 0.3)
    return folder


def test_a_job_gets_none_of_its_callers_variables(
    kilobatch: Callable[..., CommandResult], scheduler: Path, monkeypatch: pytest.MonkeyPatch
):
    (scheduler / "answers").touch()
    callers = {"SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_JOB_ID": "77", "RANK": "3", "OMP_PROC_BIND": "close"}
    for name, value in (callers | {"SBATCH_EXPORT": "NONE", "SLURM_CONF": "/etc/slurm.conf"}).items():
        monkeypatch.setenv(name, value)
    result = kilobatch("submit", *SUBMITTED)
    assert result.code == 0 and "job: 7" in result.out
    lines = (scheduler / "got").read_text().splitlines()
    got = {line.partition("=")[0]: line.partition("=")[2] for line in lines}
    assert not got.keys() & {*callers, "SBATCH_EXPORT"}
    assert got["SLURM_CONF"] == "/etc/slurm.conf" and "PATH" in got
    assert "SBATCH_EXPORT: not handed on" in result.err


@pytest.mark.parametrize("points", [1, 2])
def test_a_submission_whose_answer_is_lost_is_found(
    points: int, kilobatch: Callable[..., CommandResult], scheduler: Path
):
    sweeps = ["--sweep", "seed=0,1"] if points == 2 else []
    result = kilobatch("submit", *SUBMITTED, *sweeps)
    assert (result.code, result.err) == (0, "")
    assert ("jobs: 7_0 to 7_1" if points == 2 else "job: 7") in result.out
    pickles = ["7_0_submitted.pkl", "7_1_submitted.pkl"] if points == 2 else ["7_submitted.pkl"]
    assert {"7_submission.sh", *pickles} <= {path.name for path in Path("runs/mine/submitit").iterdir()}


def test_a_submission_of_which_nothing_is_known_keeps_the_run_for_its_job(
    kilobatch: Callable[..., CommandResult], scheduler: Path
):
    (scheduler / "squeue").write_text(SILENT)
    result = kilobatch("submit", *SUBMITTED)
    assert result.code == 2
    assert result.err.startswith("kilobatch: it is not known whether the job of runs/mine is queued: sbatch: ")
    assert "kilobatch resume runs/mine looks for it, and queues it where there is none" in result.err
    state = job_history.read_job_file(Path("runs/mine"))
    assert state and state.job_id == ""
    (scheduler / "squeue").write_text("#!/bin/sh\n")  # it answers again, and there is no such job
    (scheduler / "answers").touch()
    result = kilobatch("resume", "mine")
    assert (result.code, result.err) == (0, "") and "job: 7" in result.out


@pytest.mark.parametrize("points", [1, 2])
def test_a_job_whose_submission_was_not_answered_is_looked_for(
    points: int, kilobatch: Callable[..., CommandResult], scheduler: Path
):
    (scheduler / "squeue").write_text(SILENT)
    result = kilobatch("submit", *SUBMITTED, *(["--sweep", "seed=0,1"] if points == 2 else []))
    last = sorted(Path("runs/mine").glob("*/job.json"))[-1].parent if points == 2 else Path("runs/mine")
    first = last.with_name("0-seed-0") if points == 2 else last
    assert f"kilobatch resume {first}" in result.err, result.err
    assert "Unable to contact" in kilobatch("resume", str(last)).err, "SLURM does not answer yet"
    (scheduler / "squeue").write_text(SQUEUE)
    (scheduler / "refuses").touch()  # a second submission
    queue = (scheduler / "queue").read_text()
    if points == 2:  # both tasks of the array
        (scheduler / "squeue").write_text(SQUEUE.replace("sed 's/", "sed 's/7|/7_1|/;s/"))
    result = kilobatch("resume", str(last))
    job = "7_1" if points == 2 else "7"
    assert f"{last} is queued as job {job}; kilobatch cancel {last} ends it" in result.err, result.err
    file = job_history.read_job_file(last)
    assert file and file.job_id == job and (scheduler / "queue").read_text() == queue


def test_a_job_that_is_not_in_the_queue_is_cancelled_before_it_comes(
    kilobatch: Callable[..., CommandResult], scheduler: Path
):
    (scheduler / "squeue").write_text(SILENT)
    assert kilobatch("submit", *SUBMITTED).code == 2
    assert kilobatch("cancel", "mine").code == 2 and not Path("runs/mine/cancelled").exists()
    (scheduler / "squeue").write_text("#!/bin/sh\n")
    result = kilobatch("cancel", "mine")
    assert (result.code, result.err) == (0, "") and "so that it does not begin if it comes" in result.out
    assert Path("runs/mine/cancelled").exists() and run_folder.status(Path("runs/mine")) == "cancelled"


def test_the_copy_of_a_run_becomes_a_run_of_its_own(kilobatch: Callable[..., CommandResult], scheduler: Path):
    (scheduler / "answers").touch()
    assert kilobatch("submit", *SUBMITTED).code == 0
    before = Path("runs/mine/job.json").read_bytes()
    shutil.copytree("runs/mine", "runs/copy")
    (scheduler / "squeue").write_text("#!/bin/sh\necho '7|RUNNING|n0|1:00|None'\n")
    (scheduler / "sbatch").write_text("#!/bin/sh\necho 'Submitted batch job 8'\n")
    assert "runs/mine is running as job 7" in kilobatch("resume", "mine").err
    result = kilobatch("resume", "copy")
    assert result.code == 0 and "job: 8" in result.out
    assert f"runs/copy is a copy of {Path('runs/mine').resolve()}, whose job 7 is not its own" in result.err
    copy = job_history.read_job_file(Path("runs/copy"))
    assert copy and (copy.job_id, copy.earlier, copy.original) == ("8", [], None)
    assert Path("runs/mine/job.json").read_bytes() == before
