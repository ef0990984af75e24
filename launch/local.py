"""Jobs on this machine, in the background: `python -m kilobatch.launch.local RUN...`, as SLURM would run them. No torch
on top.

One process runs the jobs of one submission, one after another; its pid and start time, and a job's place among
several, are the job's id, so that no other process is ever taken for it.
"""

import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM, SIGUSR2
from signal import Signals as Numbers

from kilobatch.data.refusal import Refusal
from kilobatch.launch import ledger
from kilobatch.launch.ledger import JobFile
from kilobatch.launch.scheduler import Fate, JobState, Task
from kilobatch.launch.signals import Signals

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
    return _ids(process.pid, len(runs))


def command(runs: Sequence[Path], code: Path) -> str:
    """A line of shell that does what `start` does."""
    assigned = [f"{name}={shlex.quote(value)}" for name, value in _environment(code).items()]
    return " ".join([*assigned, shlex.join(_arguments(runs))])


def _arguments(runs: Sequence[Path]) -> list[str]:
    return [sys.executable, "-u", "-m", "kilobatch.launch.local", *(str(run.absolute()) for run in runs)]


def _environment(code: Path) -> dict[str, str]:
    """Our packages come from the snapshot, not from the folder that this is started in."""
    path = [str(code.absolute()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}


def _ids(pid: int, jobs: int) -> list[str]:
    began = _began(pid)
    assert began is not None, "our own process, or our child that we have not waited for"
    own = f"local-{pid}-{began}"
    return [own] if jobs == 1 else [f"{own}_{k}" for k in range(jobs)]


def _began(pid: int) -> int | None:
    """When a process began, in ticks since the machine did: no two with one pid agree. None where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@dataclass(frozen=True)
class _Job:
    pid: int
    began: int
    place: int


def _parse(job: str) -> _Job | None:
    found = re.fullmatch(r"local-(\d+)-(\d+)(?:_(\d+))?", job)
    return _Job(int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def _turn(job: _Job) -> int | None:
    """Which of its jobs a process is at, by the name that it gave itself; -1 before that, None when it is over."""
    if _began(job.pid) != job.began:
        return None
    with suppress(FileNotFoundError, ProcessLookupError):
        found = re.fullmatch(r"kilobatch (\d+)", Path(f"/proc/{job.pid}/comm").read_text().strip())
        return int(found[1]) if found else -1
    return None


@dataclass(frozen=True)
class Local:
    """limit: of the job that asks of itself, by time.monotonic()."""

    limit: float | None = None

    def states(self, ids: Sequence[str]) -> dict[str, JobState]:
        return {one: self._state(one) for one in ids}

    def _state(self, text: str) -> JobState:
        job = _parse(text)
        turn = _turn(job) if job else None
        if job is None or turn is None or turn > job.place:
            return JobState("gone")
        if turn < job.place:
            return JobState("queued", why="" if turn < 0 else "one after another")
        left = None
        if self.limit is not None and job.pid == os.getpid():
            left = self.limit - time.monotonic()
        return JobState("running", nodes=os.uname().nodename, seconds_left=left)

    def cancel(self, ids: Sequence[str]) -> None:
        """Of a job that waits for its turn, the run's marker says it."""
        for one in ids:
            self._send(one, SIGTERM)

    def signal(self, job: str, name: str) -> None:
        if not self._send(job, Numbers[f"SIG{name}"]):
            raise Refusal(f"job {job} is not running, so that no signal reaches it")

    def _send(self, text: str, number: Numbers) -> bool:
        job = _parse(text)
        if job is None or _turn(job) != job.place:
            return False
        with suppress(ProcessLookupError):
            os.kill(job.pid, number)
            return True
        return False

    def requeue(self, job: str) -> None:
        """`main` begins it anew."""

    def fate(self, job: str, restart: int, signal: str | None) -> Fate:
        """There is no preemption by SIGTERM here: whoever sends one wants it to end."""
        return "ended" if signal == "SIGTERM" else "runs"


def main() -> None:
    """Runs the jobs in order, each until it is not requeued. Exits with 1 where one failed."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    ids = _ids(os.getpid(), len(folders))
    codes = []
    for place, (folder, job) in enumerate(zip(folders, ids, strict=True)):
        signals = Signals()
        Path("/proc/self/comm").write_text(f"kilobatch {place}")
        codes.append(_until_it_ends(folder, job, signals))
    sys.exit(max(codes))


def _until_it_ends(folder: Path, job: str, signals: Signals) -> int:
    from kilobatch.launch import attempt

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
