"""Reads and writes a run's job.json (the job as submitted) and attempts.jsonl (a line for each event). No torch."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from json import JSONDecodeError
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from kilobatch.data.errors import UserError
from kilobatch.data.files import parse_json, read_model, read_record, refusing_os_errors, write_whole
from kilobatch.trainer.checkpoint.description import list_checkpoints

EVENTS = ("began", "asked", "ended", "stopped")  # of attempts.jsonl
Reason = Literal["finished", "timed_out", "preempted", "cancelled", "crashed", "refused", "node_failed"]


# As a scheduler gives them out; "" before that. They are handed to its commands, and stand in names of files.
JobId = Annotated[str, Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9_-]*)?$")]


@dataclass(frozen=True)
class Original:
    """The run that a folder is a copy of, and the job that trains it."""

    folder: str
    job_id: str

    def __str__(self) -> str:
        return f"a copy of {self.folder}, whose job{f' {self.job_id}' if self.job_id else ''} is not its own"


class JobFile(BaseModel):
    """job.json: the job that was submitted. Times are ISO 8601, UTC.

    job_id: "" while it is being submitted, once the run trains without a job, and in a copy of its folder; array_index:
    of a sweep's point, its index in the job array; code: the snapshot's path, relative to the run; signal_lead_seconds:
    as given to the scheduler; earlier: ids of earlier jobs; anyway: it trains even if the plan says that it cannot fit
    into memory; original: the run that the folder is a copy of, None: it is no copy.
    """

    cluster: Literal["slurm", "local"]
    job_id: JobId
    array_index: int | None = None
    nodes: int = Field(default=1, ge=1)
    workers_per_node: int = Field(default=1, ge=1)
    sweep: str | None = None
    submitted: str
    code: str
    interface: str | None = None
    signal_lead_seconds: int = 120
    time_minutes: int | None = Field(default=None, ge=1)
    earlier: list[JobId] = []
    anyway: bool = False
    original: Original | None = Field(default=None, exclude=True)


class _Content(JobFile):
    """What the file holds. folder, inode: of the run that the job trains, by which a copy is told from it; None: an
    earlier version has written the file."""

    folder: str | None = None
    inode: int | None = None


def read_job_file(run: Path) -> JobFile | None:
    """A run's job.json; None for a run that was never submitted. In a copy of a run's folder the job is left out, as it
    trains the original; a folder that was moved or mounted elsewhere is no copy. Raises UserError where the file is
    damaged."""
    path = run / "job.json"
    try:
        content = read_model(path, _Content, "remove it to resume with --workers", with_key=True)
    except FileNotFoundError:
        return None
    known = content.model_dump(exclude={"folder", "inode"})
    if content.folder in (None, str(run.resolve())) or content.inode == run.stat().st_ino:
        return JobFile(**known)
    return JobFile(**known | {"job_id": "", "earlier": [], "original": Original(content.folder, content.job_id)})


def write_job_file(run: Path, job: JobFile) -> None:
    """Writes a run's job.json, as that of this folder."""
    with refusing_os_errors(run / "job.json"):
        content = _Content(**job.model_dump(), folder=str(run.resolve()), inode=run.stat().st_ino)
        write_whole(run / "job.json", [content.model_dump_json(indent=2).encode(), b"\n"])


def leave_job(run: Path) -> None:
    """Notes that a run which was a job trains on this machine from now on: what became of the job says no more of it,
    nor that it was cancelled."""
    (run / "cancelled").unlink(missing_ok=True)
    if (job := read_job_file(run)) is not None and job.job_id:
        write_job_file(run, job.model_copy(update={"job_id": "", "earlier": [*job.earlier, job.job_id]}))


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


def read_attempts(run: Path, *, strict: bool = False) -> list[Attempt]:
    """The attempts in order. An attempt that wrote no end before the next began gets the reason of the signal that it
    received, else "node_failed".

    A line that is no event is passed over, as the half line that a kill leaves; a running job has to go on. strict:
    raise UserError for it instead, unless it is such a half line. Raises UserError where the file cannot be read.
    """
    attempts: list[Attempt] = []
    path = run / "attempts.jsonl"
    for number, text in enumerate(read_record(path).splitlines() if path.exists() else [], start=1):
        try:
            _add_event(attempts, text)
        except ValueError as error:
            torn = text.startswith(b"{") and isinstance(error, JSONDecodeError)
            if strict and not torn:
                message = f"{path} is damaged (line {number} is no event); remove the line: the others stay as they are"
                raise UserError(message) from error
    return attempts


def _add_event(attempts: list[Attempt], text: bytes) -> None:
    """Adds a line of attempts.jsonl to the attempts. Raises ValueError where it is no event."""
    line = parse_json(text)
    if not isinstance(line, dict) or (event := line.pop("event", None)) not in EVENTS:
        raise ValueError("no event")
    if event == "began":
        attempt = Attempt.model_validate(line)
        if attempts:
            attempts[-1] = with_unreported_end(attempts[-1])
        attempts.append(attempt)
        return
    # An attempt that was thought dead may still write its end after the next one has begun.
    index = next((i for i, known in enumerate(attempts) if known.attempt == line.get("attempt")), None)
    if index is not None:
        attempts[index] = Attempt.model_validate(attempts[index].model_dump() | line)


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
    """Records that an attempt begins. Returns its number, from 1: none that a damaged line still counts."""
    number = max((attempt.attempt for attempt in read_attempts(run)), default=0) + 1
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
    if (metrics := run / "metrics.jsonl").is_file():
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - (1 << 16)))
            numbers = re.findall(rb'^\{"step": (\d{1,18}),', file.read(), re.MULTILINE)
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
