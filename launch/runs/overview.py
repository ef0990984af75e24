"""What is known of runs, from their folders and one question to each scheduler. Loads no torch."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from kilobatch.data.errors import Refusal, did_you_mean
from kilobatch.launch.runs import job_history as ledger
from kilobatch.launch.runs import run_folder as runs
from kilobatch.launch.runs.job_history import Attempt, Counts, JobFile
from kilobatch.launch.schedulers.scheduler import JobState
from kilobatch.launch.schedulers.select import scheduler_of
from kilobatch.trainer.monitor.progress_file import Standing

RECENT = timedelta(days=7)  # ended longer ago, a run is listed only when it is asked for


class Row(BaseModel):
    """A run as it stands. Ages and eta are seconds; data_wait, knn and top1 shares; None: not known, or does not apply.

    waiting: the scheduler's reason for a queued job; nodes: their number; hosts: where it runs; problem: what ended
    the last attempt, or why nothing can be said; rank, host: of the first to fail; lines: its last ones.
    """

    run: str
    state: runs.Status | Literal["damaged"]
    sweep: str | None = None
    job: str | None = None
    waiting: str | None = None
    nodes: int = 1
    workers: int | None = None
    hosts: str | None = None
    epoch: float | None = None
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    knn: float | None = None
    top1: float | None = None
    images_per_second: float | None = None
    data_wait: float | None = None
    eta: float | None = None
    seen: float | None = None
    requeues: Counts = Counts()
    checkpoint_step: int | None = None
    checkpoint_age: float | None = None
    problem: str | None = None
    rank: int | None = None
    host: str | None = None
    lines: list[str] = []


@dataclass(frozen=True)
class Overview:
    """notes: schedulers that did not answer; older: how many runs were left out."""

    rows: list[Row]
    notes: list[str]
    older: int = 0


def overview(given: Sequence[str], sweep: str | None, everything: bool) -> Overview:
    """Of the runs and folders of runs in `given`, of a sweep's points (best first), or of all under runs/ (oldest
    first), there without those that ended long ago, unless `everything`. Raises Refusal for what is not there."""
    if sweep is not None:
        folders = _points(sweep)
    elif given:
        folders = [folder for name in given for folder in _named(name)]
    else:
        folders = sorted(_below(runs.FOLDER))
    states = {folder: _state(folder) for folder in folders}
    listed = folders
    if not (given or sweep or everything):
        listed = [folder for folder in folders if not _long_over(states[folder])]
    jobs, notes = _ask({folder: job for folder in listed if (job := _open_job(folder, states[folder]))})
    rows = {folder: _row(folder, states[folder], jobs.get(folder)) for folder in listed}
    if sweep is not None:
        listed = sorted(listed, key=lambda folder: _rank(rows[folder]))
    elif not given:
        listed = sorted(listed, key=lambda folder: _started(states[folder]))
    return Overview([rows[folder] for folder in listed], notes, older=len(folders) - len(listed))


def _below(parent: Path) -> list[Path]:
    """The runs in a folder, and those in its sweeps."""
    found: list[Path] = []
    for folder in parent.iterdir() if parent.is_dir() else ():
        if (folder / "recipe.yaml").is_file():
            found.append(folder)
        elif folder.is_dir():
            found += [path.parent for path in folder.glob("*/recipe.yaml")]
    return found


def _named(name: str) -> list[Path]:
    """One run, or those in a folder. Raises Refusal."""
    for folder in runs.places(name):
        if not (folder / "recipe.yaml").is_file() and (found := sorted(_below(folder))):
            return found
    return [runs.find(name)]


def _points(name: str) -> list[Path]:
    for folder in runs.places(name):
        if found := sorted(path.parent for path in folder.glob("*/recipe.yaml")):
            return found
    sweeps = sorted({path.parent.parent.name for path in runs.FOLDER.glob("*/*/recipe.yaml")})
    hint = did_you_mean(name, sweeps) if sweeps else f"; there are none in {runs.FOLDER}/ (kilobatch submit --sweep)"
    raise Refusal(f"there is no sweep '{name}'{hint}")


def _state(folder: Path) -> runs.State | Refusal | None:
    """None for a folder without state.json, Refusal for a damaged one: the other runs are listed all the same."""
    try:
        return runs.state(folder) if (folder / "state.json").exists() else None
    except Refusal as refusal:
        return refusal


def _started(state: runs.State | Refusal | None) -> str:
    return state.started if isinstance(state, runs.State) else ""


def _long_over(state: runs.State | Refusal | None) -> bool:
    if not isinstance(state, runs.State) or state.status in ("queued", "running"):
        return False
    return datetime.fromisoformat(state.updated) < datetime.now(UTC) - RECENT


def _open_job(folder: Path, state: runs.State | Refusal | None) -> JobFile | None:
    """The job that a scheduler knows more about than the folder does."""
    if not isinstance(state, runs.State) or state.status not in ("queued", "running"):
        return None
    return ledger.job_file(folder)


def _ask(jobs: dict[Path, JobFile]) -> tuple[dict[Path, JobState], list[str]]:
    """One call for all jobs of a kind. A scheduler that does not answer is a note; its runs are as they wrote last."""
    found, notes = {}, []
    clusters: list[Literal["slurm", "local"]] = ["slurm", "local"]
    for cluster in clusters:
        ids = {folder: job.job_id for folder, job in jobs.items() if job.cluster == cluster and job.job_id}
        if not ids:
            continue
        try:
            states = scheduler_of(cluster).states(sorted(set(ids.values())))
        except Refusal as refusal:
            notes.append(f"{refusal}; states are those that the runs wrote last")
            continue
        found |= {folder: states[job] for folder, job in ids.items()}
    return found, notes


def _row(folder: Path, state: runs.State | Refusal | None, job: JobState | None) -> Row:
    name = str(folder.relative_to(runs.FOLDER)) if folder.is_relative_to(runs.FOLDER) else str(folder)
    if isinstance(state, Refusal):
        return Row(run=name, state="damaged", problem=str(state))
    submitted, attempts, standing = ledger.job_file(folder), ledger.read(folder), Standing.of(folder)
    if state and submitted and job is None:  # being submitted, over, or of a scheduler that does not answer
        status = state.status
    else:
        status = runs.status(folder, job)
    row = Row(run=name, state=status, workers=state.workers if state else None)
    _add_job(row, submitted, job, attempts)
    _add_standing(row, standing)
    _add_checkpoint(row, folder)
    return row


def _add_job(row: Row, submitted: JobFile | None, job: JobState | None, attempts: list[Attempt]) -> None:
    if submitted:
        row.sweep, row.job, row.nodes = submitted.sweep, submitted.job_id or None, submitted.nodes
        if row.state == "queued":
            row.waiting = job.why if job else None if submitted.job_id else "being submitted"
    if row.state == "running":
        row.hosts = (job.nodes if job else "") or (",".join(attempts[-1].nodes) if attempts else None)
    row.requeues = ledger.counts(_requeued(attempts))
    last = attempts[-1] if attempts else None
    if last and row.state in ("failed", "interrupted"):
        row.rank, row.host, row.lines = last.rank, last.host, last.lines
        row.problem = ", ".join(filter(None, (last.reason, last.how, last.stopped))) or None


def _requeued(attempts: list[Attempt]) -> list[Attempt]:
    """Those that went back to the queue, by themselves or, without a word from them, by the scheduler."""
    following = [*(after.job for after in attempts[1:]), ""]
    return [one for one, after in zip(attempts, following, strict=False) if one.requeued or one.job == after]


def _add_standing(row: Row, standing: Standing | None) -> None:
    if standing is None:
        return
    for name in ("epoch", "epochs", "step", "steps", "loss", "knn", "top1", "images_per_second", "data_wait"):
        setattr(row, name, getattr(standing, name))
    row.seen = time.time() - standing.time
    if row.state == "running" and standing.seconds_left is not None:
        row.eta = max(0.0, standing.seconds_left - row.seen)


def _add_checkpoint(row: Row, folder: Path) -> None:
    found = max(_checkpoints(folder), default=None)
    if found:
        row.checkpoint_step, path = found
        row.checkpoint_age = time.time() - path.stat().st_mtime


def _checkpoints(folder: Path) -> Iterable[tuple[int, Path]]:
    for path in (folder / "checkpoints").glob("step-*"):
        yield int(path.name.removeprefix("step-")), path


def _rank(row: Row) -> tuple[bool, float, float]:
    """By top-1 of its own classifier or of k-NN, else by loss; what has none comes last."""
    loss = float("inf") if row.loss is None else row.loss
    right = row.knn if row.top1 is None else row.top1
    return (right is None, -(right or 0.0), loss)
