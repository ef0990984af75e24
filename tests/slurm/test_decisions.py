"""Decisions of jobs that SLURM, or a person with its commands, ends. Their workers are tests/programs/scripted_job.py,
which trains nothing."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.launch.recipes.recipe import resolve_recipe
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.job_history import Attempt, JobFile
from kilobatch.launch.schedulers.slurm import Slurm
from tests.helpers.programs import PROGRAMS
from tests.slurm.cluster import Cluster

JOB = """
import sys
from functools import partial
from kilobatch.launch.jobs import slurm_job
from kilobatch.launch.nodes import agent
agent.run_node = partial(agent.run_node, module="scripted_job")
slurm_job.Job(sys.argv[1])()
"""
SCRIPT = """\
#!/bin/bash
export SUBMITIT_EXECUTOR=slurm OMP_NUM_THREADS=1 PYTHONPATH={programs}:{code}
exec srun --kill-on-bad-exit=1 -o {log} --open-mode=append {python} -c '{job}' {run}
"""
CODE = Path(__file__).parents[2] / "src"
TIMEOUT = 240.0


def submitted(cluster: Cluster, folder: Path, name: str, errands: list[str], *options: str, change: str = "") -> Path:
    """Submits a run of two nodes with a worker on each. options: of sbatch."""
    changes = [f"run.name={name}", f"run.folder={folder}", *filter(None, [change])]
    recipe = resolve_recipe("demo", changes)
    run = run_folder.create_run(recipe.run, "demo", recipe.dump_yaml(), 2)
    (run / "errands").write_text("\n".join(errands))
    script = run / "job.sh"
    script.write_text(
        SCRIPT.format(programs=PROGRAMS, code=CODE, log=run / "job.log", python=sys.executable, job=JOB, run=run)
    )
    run_folder.set_status(run, "queued", 2)
    job = JobFile(cluster="slurm", job_id="", nodes=2, submitted=job_history.utc_now(), code="", time_minutes=600)
    job_history.write_job_file(run, job)
    command = ["sbatch", "--parsable", "-N2", "-n2", "-t600", "--requeue", "-o", str(run / "batch.log"), *options]
    number = cluster.command(*command, str(script))
    job_id = f"{number}_3" if "--array=3" in options else number
    job_history.write_job_file(run, job.model_copy(update={"job_id": job_id}))
    return run


def id_of(run: Path) -> str:
    job = job_history.read_job_file(run)
    assert job is not None
    return job.job_id


def until(condition: Callable[[], object], run: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        log = run / "job.log"
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "it wrote nothing"
        time.sleep(0.1)


def busy(run: Path, attempt: int = 1) -> Path:
    """Waits until both workers of the attempt are at their errand."""
    until(lambda: all((run / f"at-{attempt}-{rank}").exists() for rank in (0, 1)), run)
    return run


def over(run: Path) -> list[Attempt]:
    """Waits until SLURM has ended the job for good."""
    job = id_of(run)
    until(lambda: not Slurm().states([job])[job].open, run)
    return job_history.read_attempts(run)


@pytest.fixture(autouse=True)
def _reached(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    assert os.environ["SLURM_CONF"]


def test_signals_and_requeues_are_distinguished_from_cancellations(cluster: Cluster, tmp_path: Path):
    """All jobs run at once, since most of the time is spent waiting."""

    def submit(name: str, *options: str, change: str = "") -> Path:
        return submitted(cluster, tmp_path, name, ["waits", "finishes"], *options, change=change)

    signalled, in_an_array = submit("signalled"), submit("in-an-array", "--array=3")
    cancelled, requeued = submit("cancelled"), submit("requeued")
    unwilling = submit("unwilling", "--no-requeue")
    bounded = submit("bounded", change="run.requeue.preemptions=0")
    for run in (signalled, in_an_array, cancelled, requeued, unwilling, bounded):
        busy(run)
        assert run_folder.status(run) == "running"
    for run in (signalled, in_an_array, unwilling):
        Slurm().signal(id_of(run), "USR2")
    Slurm().cancel([id_of(cancelled)])  # as `scancel` does: no file in the run's folder tells of it
    for run in (requeued, bounded):  # to the job it looks like a preemption
        cluster.command("scontrol", "requeue", id_of(run))

    for run in (signalled, in_an_array):
        first, second = over(run)
        assert (first.reason, first.signal, first.step, first.requeued) == ("preempted", "SIGUSR2", 1, True)
        assert (second.reason, second.restart, second.from_step) == ("finished", 1, 1)
        assert second.job == id_of(run)
        assert len(second.nodes) == 2
        assert run_folder.status(run) == "finished"
    (only,) = over(cancelled)
    assert (only.reason, only.signal, only.step, only.requeued) == ("cancelled", "SIGTERM", 1, False)
    assert run_folder.status(cancelled) == "cancelled"
    first, second = over(requeued)
    assert (first.reason, first.signal, first.step, first.requeued) == ("preempted", "SIGTERM", 1, True)
    assert second.reason == "finished"
    (only,) = over(unwilling)
    assert (only.reason, only.requeued) == ("preempted", False)
    assert only.stopped and only.stopped.startswith("scontrol requeue: ")
    assert run_folder.status(unwilling) == "interrupted"
    (only,) = over(bounded)
    assert (only.reason, only.requeued) == ("preempted", False)
    assert only.stopped == "preemptions: 1, and run.requeue.preemptions allows 0"
    assert run_folder.status(bounded) == "failed"
    states = Slurm().states([id_of(run) for run in (signalled, cancelled, unwilling, bounded)])
    assert [state.state for state in states.values()] == ["finished", "cancelled", "failed", "cancelled"]


def test_a_failure_is_requeued_and_a_refusal_fails_the_job(cluster: Cluster, tmp_path: Path):
    failing = submitted(cluster, tmp_path, "failing", ["fails (once)", "finishes"])
    refusing = submitted(cluster, tmp_path, "refusing", ["refuses no room on the disk", "finishes"])
    first, second = over(failing)
    assert (first.reason, first.rank, first.host, first.requeued) == ("crashed", 1, first.nodes[1], True)
    assert first.lines[-1] == "the disk is on fire: (once)"
    assert second.reason == "finished"
    (only,) = over(refusing)
    assert (only.reason, only.lines) == ("refused", ["kilobatch: no room on the disk"])
    assert run_folder.status(refusing) == "failed"
    assert Slurm().states([id_of(refusing)])[id_of(refusing)].state == "failed"


@pytest.mark.slow
def test_a_killed_agent_is_a_failure_of_its_node(cluster: Cluster, tmp_path: Path):
    """srun ends the other tasks with SIGTERM, and SIGKILL KillWait seconds later: time enough for a requeue."""
    run = busy(submitted(cluster, tmp_path, "killed", ["waits", "finishes"]))
    host = job_history.read_attempts(run)[0].nodes[1]
    (agent,) = (one for one in cluster.processes(host) if JOB in one.cmdline() and str(run) in one.cmdline())
    agent.kill()
    first, second = over(run)
    assert first.requeued
    assert (first.reason, first.host) == ("node_failed", host)
    assert second.reason == "finished"
