"""What happened to a run's job: job.json, as it was submitted, and attempts.jsonl, a line at each turn. No torch."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from kilobatch.data.errors import Refusal
from kilobatch.data.files import write_whole

Reason = Literal["finished", "timed_out", "preempted", "cancelled", "crashed", "refused", "node_failed"]


class JobFile(BaseModel):
    """job.json: what the scheduler was asked for. Times are ISO 8601, UTC.

    job_id: "" while it is being submitted; array_index: of a sweep's point, its place in the array; code: the
    snapshot, relative to the run; signal_lead_seconds: as the scheduler was told; earlier: ids of the jobs before.
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


def job_file(run: Path) -> JobFile | None:
    """None for a run that was never submitted. Raises Refusal where job.json is damaged."""
    path = run / "job.json"
    try:
        return JobFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Refusal(f"{path} is damaged ({where}: {first['msg']}); remove it to resume with --workers") from error


def write_job_file(run: Path, job: JobFile) -> None:
    write_whole(run / "job.json", [job.model_dump_json(indent=2).encode(), b"\n"])


class Attempt(BaseModel):
    """A job's run from one start to its end; a requeued job has several.

    began, asked, ended: times, ISO 8601, UTC; ended None: it runs, or was killed before it could write.
    from_step, step: of the newest checkpoint when it began; the last step known when it ended. signal: the name of the
    one that asked it to stop. rank, host, how, lines: who failed first, how, and its last lines. stopped: why it was
    not requeued.
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


def read(run: Path) -> list[Attempt]:
    """The attempts in order. One that was followed by another without an end has the reason that is known: that of the
    signal it got, else "node_failed"."""
    attempts: list[Attempt] = []
    for line in _lines(run / "attempts.jsonl"):
        if line.pop("event") == "began":
            if attempts:
                attempts[-1] = lost(attempts[-1])
            attempts.append(Attempt(**line))
            continue
        # An attempt that was taken for dead may still write its end after the next has begun.
        index = next((i for i, one in enumerate(attempts) if one.attempt == line["attempt"]), None)
        if index is not None:
            attempts[index] = attempts[index].model_copy(update=line)
    return attempts


def lost(attempt: Attempt) -> Attempt:
    """The attempt, once it is known to have ended without a word."""
    if attempt.reason is not None and attempt.ended is not None:
        return attempt
    how = f"killed after {attempt.signal}, before it could end" if attempt.signal else "its first node went down"
    return attempt.model_copy(update={"reason": attempt.reason or "node_failed", "how": attempt.how or how})


def counts(attempts: Sequence[Attempt]) -> Counts:
    """How often each kind of end came."""
    found = Counts()
    for name in (_COUNTED[one.reason] for one in attempts if one.reason in _COUNTED):
        setattr(found, name, getattr(found, name) + 1)
    return found


def began(run: Path, job: str, restart: int, nodes: list[str], workers: int) -> int:
    """Opens an attempt. Returns its number, from 1."""
    number = len(read(run)) + 1
    known = {"job": job, "restart": restart, "nodes": nodes, "workers": workers, "from_step": checkpoint_step(run)}
    _add(run, {"attempt": number, "event": "began", **known, "began": now()})
    return number


def asked(run: Path, attempt: int, signal: str, reason: Reason) -> None:
    """Notes at once that the attempt was asked to stop: it may be killed before it can write its end."""
    _add(run, {"attempt": attempt, "event": "asked", "asked": now(), "signal": signal, "reason": reason})


def ended(run: Path, attempt: int, reason: Reason, **known: Any) -> None:
    """known: rank, host, how, lines, requeued, stopped, as in Attempt."""
    _add(run, {"attempt": attempt, "event": "ended", "ended": now(), "reason": reason, "step": step(run), **known})


def stays(run: Path, attempt: int, why: str) -> None:
    """The attempt was not requeued after all."""
    _add(run, {"attempt": attempt, "event": "stopped", "requeued": False, "stopped": why})


def step(run: Path) -> int:
    """The last step known: the newest checkpoint's or the newest line's of metrics.jsonl.

    Not a progress report's, which comes by the clock: a crash that repeats is to be found at the same step each time.
    """
    logged = 0
    if (metrics := run / "metrics.jsonl").exists():
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - (1 << 16)))
            numbers = re.findall(rb'^\{"step": (\d+),', file.read(), re.MULTILINE)
            logged = int(numbers[-1]) if numbers else 0
    return max(checkpoint_step(run), logged)


def checkpoint_step(run: Path) -> int:
    """The newest whole checkpoint's, by its folder's name; 0 where there is none."""
    return max((int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")), default=0)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _add(run: Path, line: dict[str, Any]) -> None:
    """One line, synced. A line that a kill left half-written is closed first."""
    with (run / "attempts.jsonl").open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
        torn = size > 0 and file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines; half a line is what a kill left."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
