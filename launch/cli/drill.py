"""`kilobatch drill`: two jobs of a recipe, one of them stopped and killed, and what that cost. No torch on top."""

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

from kilobatch.data.errors import Refusal
from kilobatch.launch.cli import resume as resubmitting
from kilobatch.launch.cli.kill_worker import strike
from kilobatch.launch.jobs import submit as submitting
from kilobatch.launch.runs import job_history as ledger
from kilobatch.launch.runs import run_folder as runs
from kilobatch.launch.runs.job_history import Attempt, JobFile
from kilobatch.launch.schedulers.select import scheduler_of

LOOK = 1.0  # seconds between two looks at the runs' files
ASK = 30.0  # seconds between two questions to the scheduler
STEPS = 5  # after a checkpoint, so that a kill costs some
STRUCK = 60.0  # seconds for a step of srun to start beside the job's own


@dataclass(frozen=True)
class Blow:
    """name: of what was done to the job; lost: steps that were made in vain; away: seconds without a step's worth of
    work, from the blow to the next attempt's start."""

    name: str
    lost: int
    away: float


def drill(recipe: str, overrides: list[str], given: str | None, resources: dict[str, Any]) -> bool:
    """Submits, waits, strikes, compares and reports; whether the struck run ended with the other's weights and a
    signal cost no step.

    Raises Refusal where the recipe or the resources are refused, and where the run is over before it can be struck.
    """
    name = f"drill-{datetime.now():%Y%m%d-%H%M%S}"
    (whole,) = submitting.submit(recipe, overrides, [], f"{name}-whole", given, resources, dry_run=False)
    (struck,) = submitting.submit(recipe, overrides, [], f"{name}-struck", given, resources, dry_run=False)
    try:
        blows = [_blow(struck, "asked to stop (SIGUSR2)", _ask_to_stop), _blow(struck, "a worker killed", _kill_worker)]
        for run in (struck, whole):
            print(f"waiting for the end of {run}", flush=True)
            _wait(run, lambda run=run: runs.state(run).status == "finished")
    except BaseException:  # Ctrl-C too: nobody waits for these jobs any more
        resubmitting.cancel([str(whole), str(struck)])
        raise
    return _report(blows, _difference(whole, struck))


def _blow(run: Path, name: str, do: Callable[[Path, JobFile, Attempt], None]) -> Blow:
    """Waits until the run has saved and gone on, does it, and waits for the next attempt."""
    print(f"{run}: waiting for steps, then: {name}", flush=True)
    before = len(ledger.read(run)) or 1

    def got_on() -> bool:
        attempts = ledger.read(run)
        if len(attempts) < before or attempts[-1].ended:
            return False
        saved = ledger.checkpoint_step(run)
        return saved > attempts[-1].from_step and ledger.step(run) >= saved + STEPS

    _wait(run, got_on)
    job, attempt = _job(run), ledger.read(run)[-1]
    began = time.time()
    do(run, job, attempt)
    _wait(run, lambda: len(ledger.read(run)) > attempt.attempt)
    *_, ended, now = ledger.read(run)
    # One that was killed could not write how far it was; its metrics tell, until they are cut off.
    reached = ledger.step(run) if ended.step is None else ended.step
    away = datetime.fromisoformat(now.began).timestamp() - began
    print(f"{run}: {ended.reason} at step {reached}, going on from step {now.from_step}", flush=True)
    return Blow(name, reached - now.from_step, away)


def _job(run: Path) -> JobFile:
    job = ledger.job_file(run)
    assert job is not None, "it was just submitted"
    return job


def _ask_to_stop(run: Path, job: JobFile, attempt: Attempt) -> None:
    scheduler_of(job.cluster).signal(job.job_id, "USR2")


def _kill_worker(run: Path, job: JobFile, attempt: Attempt) -> None:
    """Of the last node, by a step beside the job's own, which needs no rights there."""
    rank = attempt.workers - 1
    if job.cluster == "local":
        strike(run, rank)
        return
    code = run / job.code
    inner = [
        "env",
        f"PYTHONPATH={code.resolve()}",
        sys.executable,
        "-m",
        "kilobatch.launch.cli.kill_worker",
        str(run.absolute()),
        str(rank),
    ]
    outer = ["srun", "--overlap", f"--jobid={job.job_id}", f"--nodelist={attempt.nodes[-1]}", "-N1", "-n1", "--mem=0"]
    try:
        done = subprocess.run([*outer, *inner], capture_output=True, text=True, timeout=STRUCK)
    except subprocess.TimeoutExpired as error:
        raise Refusal(f"no step of srun starts within a running job here: {shlex.join(outer)}") from error
    if done.returncode:
        raise Refusal(f"no worker could be killed: {shlex.join(outer)} said: {done.stderr.strip()}")


def _wait(run: Path, condition: Callable[[], bool]) -> None:
    """Raises Refusal where the run is over before that."""
    asked = time.monotonic()
    while not condition():
        time.sleep(LOOK)
        status = runs.state(run).status
        if status in ("queued", "running") and time.monotonic() - asked >= ASK:
            status, asked = runs.status(run), time.monotonic()
        if status not in ("queued", "running") and not condition():
            more = "; give the recipe more epochs, or checkpoint.every_steps less" if status == "finished" else ""
            raise Refusal(f"{run} is {status} already{more} (kilobatch logs {run})")


def _difference(whole: Path, struck: Path) -> float:
    """The largest between the two runs' final weights and optimizer states; 0 where they are equal to the bit."""
    from kilobatch.trainer.checkpoint.reader import newest, open_saved

    def unreadable(damage: str) -> None:
        raise Refusal(damage)

    first, second = (newest(run / "checkpoints", unreadable) for run in (whole, struck))
    assert first and second, "a finished run has a checkpoint"
    one, other = open_saved(first), open_saved(second)
    names = [name for name in one.names() if name.startswith(("method.", "optimizer."))]
    return max((one.whole(name).double() - other.whole(name).double()).abs().max().item() for name in names)


def _report(blows: list[Blow], difference: float) -> bool:
    table = Table("what happened", "steps lost", "until it went on")
    for blow in blows:
        table.add_row(blow.name, str(blow.lost), f"{blow.away:.0f} s")
    Console().print(table)
    equal = difference == 0
    print("final weights: " + ("equal to the bit" if equal else f"they differ by up to {difference:.1e}"))
    return equal and blows[0].lost == 0
