"""Reads and writes a run's job.json (the job as submitted) and attempts.jsonl (a line for each event). No torch."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from kilobatch.data.files import read_model, refusing_os_errors, write_whole
from kilobatch.trainer.checkpoint.description import list_checkpoints

Reason = Literal["finished", "timed_out", "preempted", "cancelled", "crashed", "refused", "node_failed"]


class JobFile(BaseModel):
    """job.json: the job that was submitted. Times are ISO 8601, UTC.

    job_id: "" while it is being submitted; array_index: of a sweep's point, its index in the job array; code: the
    snapshot's path, relative to the run; signal_lead_seconds: as given to the scheduler; earlier: ids of earlier jobs.
    """

    cluster: Literal["slurm", "local"]
    job_id: str
    array_index: int | None = None
    nodes: int = 1
    workers_per_node: int = 1
    sweep: str | None = None
    submitted: str
    code: str
    interface: str | None = None
    signal_lead_seconds: int = 120
    time_minutes: int | None = None
    earlier: list[str] = []


def read_job_file(run: Path) -> JobFile | None:
    """A run's job.json; None for a run that was never submitted. Raises UserError where the file is damaged."""
    path = run / "job.json"
    try:
        return read_model(path, JobFile, "remove it to resume with --workers", with_key=True)
    except FileNotFoundError:
        return None


def write_job_file(run: Path, job: JobFile) -> None:
    with refusing_os_errors(run / "job.json"):
        write_whole(run / "job.json", [job.model_dump_json(indent=2).encode(), b"\n"])


class Attempt(BaseModel):
    """One execution of a job, from a start to an end; a requeued job has several.

    began, asked, ended: times of the start, of the request to stop and of the end, ISO 8601, UTC; ended None: it runs,
    or was killed before it could write. from_step: of the newest checkpoint when it began; step: the last one known
    when it ended. signal: the name of the signal that asked it to stop. rank, host, how, lines: of the worker that
    failed first. stopped: why it was not requeued.
    """

    attempt: int
    job: str
    restart: int
    began: str
    nodes: list[str]
    workers: int
    from_step: int
    asked: str | None = None
    signal: str | None = None
    ended: str | None = None
    step: int | None = None
    reason: Reason | None = None
    rank: int | None = None
    host: str | None = None
    how: str | None = None
    lines: list[str] = []
    requeued: bool = False
    stopped: str | None = None


class Counts(BaseModel):
    """The number of attempts that ended in each of these ways."""

    preemptions: int = 0
    timeouts: int = 0
    crashes: int = 0
    node_failures: int = 0


_COUNTED = {
    "preempted": "preemptions",
    "timed_out": "timeouts",
    "crashed": "crashes",
    "node_failed": "node_failures",
}


def read_attempts(run: Path) -> list[Attempt]:
    """The attempts in order. An attempt that wrote no end before the next began gets the reason of the signal that it
    received, else "node_failed"."""
    attempts: list[Attempt] = []
    for line in _lines(run / "attempts.jsonl"):
        if line.pop("event") == "began":
            if attempts:
                attempts[-1] = with_unreported_end(attempts[-1])
            attempts.append(Attempt(**line))
            continue
        # An attempt that was thought dead may still write its end after the next one has begun.
        index = next((i for i, known in enumerate(attempts) if known.attempt == line["attempt"]), None)
        if index is not None:
            attempts[index] = attempts[index].model_copy(update=line)
    return attempts


def with_unreported_end(attempt: Attempt) -> Attempt:
    """The attempt with a reason and a description of its end, for one that ended without writing any."""
    if attempt.reason is not None and attempt.ended is not None:
        return attempt
    how = f"killed after {attempt.signal}, before it could end" if attempt.signal else "its first node went down"
    return attempt.model_copy(update={"reason": attempt.reason or "node_failed", "how": attempt.how or how})


def count_ends(attempts: Sequence[Attempt]) -> Counts:
    """The number of attempts by kind of end."""
    counted = Counts()
    for name in (_COUNTED[attempt.reason] for attempt in attempts if attempt.reason in _COUNTED):
        setattr(counted, name, getattr(counted, name) + 1)
    return counted


def record_start(run: Path, job: str, restart: int, nodes: list[str], workers: int) -> int:
    """Records that an attempt begins. Returns its number, from 1."""
    number = len(read_attempts(run)) + 1
    fields = {"job": job, "restart": restart, "nodes": nodes, "workers": workers, "from_step": checkpoint_step(run)}
    _add(run, {"attempt": number, "event": "began", **fields, "began": utc_now()})
    return number


def record_stop_request(run: Path, attempt: int, signal: str, reason: Reason) -> None:
    """Records at once that the attempt was asked to stop, since it may be killed before it can write its end."""
    _add(run, {"attempt": attempt, "event": "asked", "asked": utc_now(), "signal": signal, "reason": reason})


def record_end(run: Path, attempt: int, reason: Reason, **fields: Any) -> None:
    """Records that an attempt has ended. fields: rank, host, how, lines, requeued, stopped, as in Attempt."""
    end = {"attempt": attempt, "event": "ended", "ended": utc_now(), "reason": reason, "step": last_step(run)}
    _add(run, end | fields)


def record_not_requeued(run: Path, attempt: int, why: str) -> None:
    """Records that an attempt was not requeued after all, although its end says so."""
    _add(run, {"attempt": attempt, "event": "stopped", "requeued": False, "stopped": why})


def last_step(run: Path) -> int:
    """The last step known: of the newest checkpoint or of the newest line of metrics.jsonl.

    Progress reports are not used: they are written at intervals of time, so that a crash that repeats at one step would
    seem to come at different ones.
    """
    logged = 0
    if (metrics := run / "metrics.jsonl").exists():
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - (1 << 16)))
            numbers = re.findall(rb'^\{"step": (\d+),', file.read(), re.MULTILINE)
            logged = int(numbers[-1]) if numbers else 0
    return max(checkpoint_step(run), logged)


def checkpoint_step(run: Path) -> int:
    """The step of the newest checkpoint, by its folder's name; 0 where there is none."""
    return max(list_checkpoints(run / "checkpoints"), default=0)


def last_line(lines: Sequence[str]) -> str:
    """The last line with any text of what a worker wrote, without spaces around it; "" where there is none."""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def utc_now() -> str:
    """The time, ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _add(run: Path, line: dict[str, Any]) -> None:
    """Appends one line and syncs it. A line that a kill left half-written is ended first."""
    path = run / "attempts.jsonl"
    with refusing_os_errors(path), path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
        torn = size > 0 and file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of JSON lines. A half line, left by a kill, is passed over."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
