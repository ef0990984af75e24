"""`kilobatch drill`: submits a recipe twice, causes two faults in one of the runs, and reports what they cost.

torch is imported only when the two runs are compared at the end.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kilobatch.data.errors import UserError
from kilobatch.launch.cli.kill_worker import kill_worker
from kilobatch.launch.cli.resume import cancel
from kilobatch.launch.jobs import submit
from kilobatch.launch.processes.import_path import import_variables
from kilobatch.launch.processes.output import say
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.job_history import Attempt, JobFile
from kilobatch.launch.runs.table_printing import print_table
from kilobatch.launch.schedulers.environment import job_environment
from kilobatch.launch.schedulers.select import scheduler_of

POLL_SECONDS = 1.0  # between two reads of the runs' files
ASK_SCHEDULER_SECONDS = 30.0  # between two requests to the scheduler
STEPS_AFTER_CHECKPOINT = 5  # steps to wait for after a checkpoint, so that a kill loses some
SRUN_SECONDS = 60.0  # for srun to start another step within a running job


@dataclass(frozen=True)
class Fault:
    """What was done to a job, and what that cost. steps_lost: steps that had to be repeated; seconds: from the fault to
    the start of the next attempt."""

    name: str
    steps_lost: int
    seconds: float


def drill(recipe: str, overrides: list[str], cluster_name: str | None, resources: dict[str, Any]) -> bool:
    """Submits two runs of a recipe, causes faults in one of them, and compares them when both have ended.

    Returns whether both ended with the same weights, and the signal to stop cost no step. Raises UserError where the
    recipe or the resources are refused, and where the run is over before a fault could be caused.
    """
    name = f"drill-{datetime.now():%Y%m%d-%H%M%S}"
    (undisturbed,) = submit.submit(recipe, overrides, [], f"{name}-whole", cluster_name, resources, dry_run=False)
    (disturbed,) = submit.submit(recipe, overrides, [], f"{name}-struck", cluster_name, resources, dry_run=False)
    try:
        faults = [
            _cause_fault(disturbed, "asked to stop (SIGUSR2)", _ask_to_stop),
            _cause_fault(disturbed, "a worker killed", _kill_worker),
        ]
        for run in (disturbed, undisturbed):
            say(f"waiting for the end of {run}")
            _wait(run, lambda run=run: run_folder.read_state(run).status == "finished")
    except BaseException:  # also at Ctrl-C: nobody waits for these jobs any more
        cancel([str(undisturbed), str(disturbed)])
        raise
    return _report(faults, _largest_difference(undisturbed, disturbed))


def _cause_fault(run: Path, name: str, action: Callable[[Path, JobFile, Attempt], None]) -> Fault:
    """Waits until the run has made some steps after a checkpoint, causes the fault, and waits for the next attempt."""
    say(f"{run}: waiting for steps, then: {name}")
    before = len(job_history.read_attempts(run)) or 1

    def has_advanced() -> bool:
        attempts = job_history.read_attempts(run)
        if len(attempts) < before or attempts[-1].ended:
            return False
        saved = job_history.checkpoint_step(run)
        return saved > attempts[-1].from_step and job_history.last_step(run) >= saved + STEPS_AFTER_CHECKPOINT

    _wait(run, has_advanced)
    job, attempt = _job(run), job_history.read_attempts(run)[-1]
    began = time.monotonic()
    action(run, job, attempt)
    _wait(run, lambda: len(job_history.read_attempts(run)) > attempt.attempt)
    seconds = time.monotonic() - began  # by one clock: that of the job's node may be another
    *_, ended, now = job_history.read_attempts(run)
    # A killed attempt could not write its last step. metrics.jsonl has it until the next attempt cuts the file back.
    reached = job_history.last_step(run) if ended.step is None else ended.step
    say(f"{run}: {ended.reason} at step {reached}, going on from step {now.from_step}")
    return Fault(name, reached - now.from_step, seconds)


def _job(run: Path) -> JobFile:
    job = job_history.read_job_file(run)
    assert job is not None, "it was just submitted"
    return job


def _ask_to_stop(run: Path, job: JobFile, attempt: Attempt) -> None:
    scheduler_of(job.cluster).signal(job.job_id, "USR2")


def _kill_worker(run: Path, job: JobFile, attempt: Attempt) -> None:
    """Kills the last worker. On SLURM srun does it, as another step of the job: that needs no login on the node."""
    rank = attempt.workers - 1
    if job.cluster == "local":
        kill_worker(run, rank)
        return
    code = run / job.code
    inner = [
        "env",
        *(f"{name}={value}" for name, value in import_variables(code.resolve()).items()),
        sys.executable,
        "-m",
        "kilobatch.launch.cli.kill_worker",
        str(run.absolute()),
        str(rank),
    ]
    outer = ["srun", "--overlap", f"--jobid={job.job_id}", f"--nodelist={attempt.nodes[-1]}", "-N1", "-n1", "--mem=0"]
    try:
        done = subprocess.run(
            [*outer, *inner], capture_output=True, text=True, timeout=SRUN_SECONDS, env=job_environment()
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"no step of srun starts within a running job here: {shlex.join(outer)}") from error
    if done.returncode:
        raise UserError(f"no worker could be killed: {shlex.join(outer)} said: {done.stderr.strip()}")


def _wait(run: Path, condition: Callable[[], bool]) -> None:
    """Waits for the condition. Raises UserError where the run is over before."""
    asked_at = time.monotonic()
    while not condition():
        time.sleep(POLL_SECONDS)
        status = run_folder.read_state(run).status
        if status in ("queued", "running") and time.monotonic() - asked_at >= ASK_SCHEDULER_SECONDS:
            status, asked_at = run_folder.status(run), time.monotonic()
        if status not in ("queued", "running") and not condition():
            more = "; give the recipe more epochs, or checkpoint.every_steps less" if status == "finished" else ""
            raise UserError(f"{run} is {status} already{more} (kilobatch logs {run})")


def _largest_difference(undisturbed: Path, disturbed: Path) -> float:
    """The largest difference between the runs' final weights and optimizer states; 0 where they are bitwise equal."""
    from kilobatch.trainer.checkpoint.reader import newest, open_saved

    def unreadable(damage: str) -> None:
        raise UserError(damage)

    paths = [newest(run / "checkpoints", unreadable) for run in (undisturbed, disturbed)]
    assert all(paths), "a finished run has a checkpoint"
    first, second = (open_saved(path) for path in paths if path)
    names = [name for name in first.names() if name.startswith(("method.", "optimizer."))]
    return max((first.whole(name).double() - second.whole(name).double()).abs().max().item() for name in names)


def _report(faults: list[Fault], difference: float) -> bool:
    table = Table("what happened", "steps lost", "until it went on")
    for fault in faults:
        table.add_row(fault.name, str(fault.steps_lost), f"{fault.seconds:.0f} s")
    print_table(table, Console(emoji=False))
    equal = difference == 0
    print("final weights: " + ("equal to the bit" if equal else f"they differ by up to {difference:.1e}"))
    return equal and faults[0].steps_lost == 0
