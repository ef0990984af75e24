"""Runs jobs in the background of this machine, one after another, as SLURM would run them.

    python -m kilobatch.launch.jobs.local_queue RUN...

One process runs all jobs of a submission. A job's id is made of its process id, the start time of the process and the
job's place in the submission, so that no other process is ever taken for it. Loads no torch before a job begins.
"""

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import SIGUSR2

from kilobatch.launch.jobs.signals import Signals
from kilobatch.launch.processes.import_path import import_variables
from kilobatch.launch.runs import job_history
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.launch.schedulers.environment import job_environment
from kilobatch.launch.schedulers.local import Local, job_ids
from kilobatch.launch.schedulers.scheduler import Task

REQUEUE_SECONDS = 1.0  # between a requeue and the next attempt


def start(runs: Sequence[Path], code: Path) -> list[str]:
    """Starts a process in the background that runs submitted runs in order, with the code snapshot. Returns the ids of
    their jobs. What that process prints goes to `submitit/local.log` in the folder of the run, or of the sweep."""
    folder = runs[0] if len(runs) == 1 else runs[0].parent
    (folder / "submitit").mkdir(exist_ok=True)
    with (folder / "submitit" / "local.log").open("ab") as log:
        process = subprocess.Popen(
            _arguments(runs),
            env=job_environment(keep_devices=True) | import_variables(code),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # so that it goes on when this terminal is closed
        )
    return job_ids(process.pid, len(runs))


def command(runs: Sequence[Path], code: Path) -> str:
    """A line of shell that does what `start` does."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in import_variables(code).items()]
    return " ".join([*variables, shlex.join(_arguments(runs))])


def _arguments(runs: Sequence[Path]) -> list[str]:
    return [sys.executable, "-u", "-m", "kilobatch.launch.jobs.local_queue", *(str(run.absolute()) for run in runs)]


def main() -> None:
    """Runs each job in order, with all its attempts. Exits with 1 where a job failed."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    ids = job_ids(os.getpid(), len(folders))
    codes = []
    for place, (folder, job) in enumerate(zip(folders, ids, strict=True)):
        signals = Signals()
        Path("/proc/self/comm").write_text(f"kilobatch {place}")
        codes.append(_run_to_the_end(folder, job, signals))
    sys.exit(max(codes))


def _run_to_the_end(folder: Path, job: str, signals: Signals) -> int:
    """Runs a job until it is not requeued any more. Returns the exit code of its last attempt."""
    from kilobatch.launch.jobs import attempt

    submitted = job_history.read_job_file(folder)
    assert submitted is not None, "job.json is written before a job is started"
    restart = 0
    while True:
        task = Task(job, restart, node=0, nodes=1, hosts=[os.uname().nodename])
        with _time_limit(submitted) as limit:
            outcome = attempt.run_attempt(folder, task, Local(limit), signals)
        if not outcome.requeued:
            return outcome.code
        signals = Signals()  # a signal that comes from now on is meant for the next attempt
        restart += 1
        time.sleep(REQUEUE_SECONDS)


@contextmanager
def _time_limit(submitted: JobFile) -> Iterator[float | None]:
    """Signals this process before the job's time limit, as SLURM does. Yields the limit, by time.monotonic().

    A job that takes longer to save is not killed at its limit, since no other job waits for this machine.
    """
    if submitted.time_minutes is None:
        yield None
        return
    seconds = submitted.time_minutes * 60.0
    ahead = max(0.0, seconds - submitted.signal_lead_seconds)
    alarm = threading.Timer(ahead, os.kill, (os.getpid(), SIGUSR2))
    alarm.daemon = True
    alarm.start()
    try:
        yield time.monotonic() + seconds
    finally:
        alarm.cancel()


if __name__ == "__main__":
    main()
