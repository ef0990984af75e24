"""Jobs in the background of this machine: asked after, signalled, cancelled. Loads no torch."""

import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from signal import Signals as Numbers

from kilobatch.data.errors import Refusal
from kilobatch.launch.schedulers.scheduler import Fate, JobState


def job_ids(pid: int, jobs: int) -> list[str]:
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
