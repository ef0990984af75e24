"""Jobs on this machine, in the background: `python -m kilobatch.launch.jobs.local_queue RUN...`, as SLURM would run
them. No torch on top.

One process runs the jobs of one submission, one after another; its pid and start time, and a job's place among
several, are the job's id, so that no other process is ever taken for it.
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
from kilobatch.launch.runs import job_history as ledger
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.launch.schedulers.local import Local, job_ids
from kilobatch.launch.schedulers.scheduler import Task

PAUSE = 1.0  # seconds between a requeue and the next attempt


def start(runs: Sequence[Path], code: Path) -> list[str]:
    """Runs submitted runs in the background, in order, with the code snapshot; returns their job ids.

    What the process itself says stands in `submitit/local.log` of the run, or of the sweep's folder.
    """
    folder = runs[0] if len(runs) == 1 else runs[0].parent
    (folder / "submitit").mkdir(exist_ok=True)
    with (folder / "submitit" / "local.log").open("ab") as log:
        process = subprocess.Popen(
            _arguments(runs),
            env=os.environ | _environment(code),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # outlives this terminal
        )
    return job_ids(process.pid, len(runs))


def command(runs: Sequence[Path], code: Path) -> str:
    """A line of shell that does what `start` does."""
    assigned = [f"{name}={shlex.quote(value)}" for name, value in _environment(code).items()]
    return " ".join([*assigned, shlex.join(_arguments(runs))])


def _arguments(runs: Sequence[Path]) -> list[str]:
    return [sys.executable, "-u", "-m", "kilobatch.launch.jobs.local_queue", *(str(run.absolute()) for run in runs)]


def _environment(code: Path) -> dict[str, str]:
    """Our packages come from the snapshot, not from the folder that this is started in."""
    path = [str(code.absolute()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}


def main() -> None:
    """Runs the jobs in order, each until it is not requeued. Exits with 1 where one failed."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    ids = job_ids(os.getpid(), len(folders))
    codes = []
    for place, (folder, job) in enumerate(zip(folders, ids, strict=True)):
        signals = Signals()
        Path("/proc/self/comm").write_text(f"kilobatch {place}")
        codes.append(_until_it_ends(folder, job, signals))
    sys.exit(max(codes))


def _until_it_ends(folder: Path, job: str, signals: Signals) -> int:
    from kilobatch.launch.jobs import attempt

    submitted = ledger.job_file(folder)
    assert submitted is not None, "it is written before a job is started"
    restart = 0
    while True:
        task = Task(job, restart, node=0, nodes=1, hosts=[os.uname().nodename])
        with _time_limit(submitted) as limit:
            outcome = attempt.run(folder, task, Local(limit), signals)
        if not outcome.requeued:
            return outcome.code
        signals = Signals()  # one that comes now is the next attempt's
        restart += 1
        time.sleep(PAUSE)


@contextmanager
def _time_limit(submitted: JobFile) -> Iterator[float | None]:
    """As SLURM announces it. Nobody waits for this machine, so that what takes longer to save is let finish."""
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
