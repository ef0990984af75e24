"""Finds, signals and cancels jobs that run in the background of this machine. Loads no torch."""

import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from signal import Signals as Numbers

from kilobatch.data.errors import UserError
from kilobatch.launch.schedulers.scheduler import Fate, JobState


def job_ids(pid: int, jobs: int) -> list[str]:
    """The ids of the jobs that a process runs one after another."""
    began = _start_ticks(pid)
    assert began is not None, "our own process, or our child that we have not waited for"
    own = f"local-{pid}-{began}"
    return [own] if jobs == 1 else [f"{own}_{k}" for k in range(jobs)]


def _start_ticks(pid: int) -> int | None:
    """The start of a process, in clock ticks since the machine started: it tells apart processes that had the same pid.
    None where the process is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@dataclass(frozen=True)
class _Job:
    """began: start of its process, in clock ticks; index: among the jobs that the process runs one after another."""

    pid: int
    began: int
    index: int


def _parse(job: str) -> _Job | None:
    found = re.fullmatch(r"local-(\d+)-(\d+)(?:_(\d+))?", job)
    return _Job(int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def _current_index(job: _Job) -> int | None:
    """The index of the job that a process runs, by the name that it gave itself; -1 before the first, None once the
    process is gone."""
    if _start_ticks(job.pid) != job.began:
        return None
    with suppress(FileNotFoundError, ProcessLookupError):
        found = re.fullmatch(r"kilobatch (\d+)", Path(f"/proc/{job.pid}/comm").read_text().strip())
        return int(found[1]) if found else -1
    return None


@dataclass(frozen=True)
class Local:
    """This machine as a scheduler. limit: end of this process's own job, by time.monotonic(); None: no limit."""

    limit: float | None = None

    def states(self, ids: Sequence[str]) -> dict[str, JobState]:
        return {job: self._state(job) for job in ids}

    def _state(self, text: str) -> JobState:
        job = _parse(text)
        current = _current_index(job) if job else None
        if job is None or current is None or current > job.index:
            return JobState("gone")
        if current < job.index:
            return JobState("queued", why="" if current < 0 else "one after another")
        left = None
        if self.limit is not None and job.pid == os.getpid():
            left = self.limit - time.monotonic()
        return JobState("running", nodes=os.uname().nodename, seconds_left=left)

    def cancel(self, ids: Sequence[str]) -> None:
        """Ends the jobs that run. A job that waits for its turn finds the file `cancelled` in its run's folder."""
        for job in ids:
            self._send(job, SIGTERM)

    def signal(self, job: str, name: str) -> None:
        if not self._send(job, Numbers[f"SIG{name}"]):
            raise UserError(f"job {job} is not running, so that no signal reaches it")

    def _send(self, text: str, number: Numbers) -> bool:
        job = _parse(text)
        if job is None or _current_index(job) != job.index:
            return False
        with suppress(ProcessLookupError):
            os.kill(job.pid, number)
            return True
        return False

    def requeue(self, job: str, restart: int) -> None:
        """Does nothing: the process that runs the jobs starts the job again (jobs/local_queue.py)."""

    def fate(self, job: str, restart: int, signal: str | None) -> Fate:
        """Takes SIGTERM for a request to end: nothing preempts a job on this machine."""
        return "ended" if signal == "SIGTERM" else "runs"
