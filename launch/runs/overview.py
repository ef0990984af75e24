"""Collects the state of runs from their folders and from one query to each scheduler. Loads no torch."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from kilobatch.data.errors import UserError, did_you_mean
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.final_evaluation import read_final_evaluation
from kilobatch.launch.runs.job_history import Attempt, Counts, JobFile
from kilobatch.launch.schedulers.scheduler import JobState
from kilobatch.launch.schedulers.select import scheduler_of
from kilobatch.trainer.checkpoint.description import list_checkpoints
from kilobatch.trainer.monitor.progress_file import Progress

RECENT = timedelta(days=7)  # runs that ended longer ago are listed only when the user names them


class RunRow(BaseModel):
    """The present state of a run. Ages and eta are seconds; data_wait, knn and top1 are shares; None: not known, or
    does not apply.

    waiting: the scheduler's reason why a job is queued; nodes: their number; hosts: names of the nodes it runs on;
    seen: age of the last progress report; problem: what ended the last attempt, or what is wrong with the folder; rank,
    host, lines: of the worker that failed first, and its last lines.
    """

    run: str
    state: run_folder.Status | Literal["damaged"]
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

    rows: list[RunRow]
    notes: list[str]
    older: int = 0


def overview(names: Sequence[str], sweep: str | None, everything: bool) -> Overview:
    """The state of the runs and folders of runs that are named, of a sweep's points (best first), or of all runs under
    runs/ (oldest first); of these, runs that ended long ago are left out unless `everything`.

    Raises UserError for a name that is no run, no folder of runs and no sweep.
    """
    if sweep is not None:
        folders = _sweep_runs(sweep)
    elif names:
        folders = [folder for name in names for folder in _find_runs(name)]
    else:
        folders = sorted(_runs_in(run_folder.FOLDER))
    states = {folder: _read_state(folder) for folder in folders}
    listed = folders
    if not (names or sweep or everything):
        listed = [folder for folder in folders if not _ended_long_ago(states[folder])]
    jobs, notes = _query_schedulers(
        {folder: job for folder in listed if (job := _unfinished_job(folder, states[folder]))}
    )
    rows = {folder: _row(folder, states[folder], jobs.get(folder)) for folder in listed}
    if sweep is not None:
        listed = sorted(listed, key=lambda folder: _sort_key(rows[folder]))
    elif not names:
        listed = sorted(listed, key=lambda folder: _started(states[folder]))
    return Overview([rows[folder] for folder in listed], notes, older=len(folders) - len(listed))


def _runs_in(parent: Path) -> list[Path]:
    """The runs in a folder, and those in the sweeps in it."""
    found: list[Path] = []
    for folder in parent.iterdir() if parent.is_dir() else ():
        if (folder / "recipe.yaml").is_file():
            found.append(folder)
        elif folder.is_dir():
            found += [path.parent for path in folder.glob("*/recipe.yaml")]
    return found


def _find_runs(name: str) -> list[Path]:
    """The run of this name, or the runs in the folder of this name. Raises UserError."""
    for folder in run_folder.candidate_paths(name):
        if not (folder / "recipe.yaml").is_file() and (found := sorted(_runs_in(folder))):
            return found
    return [run_folder.find_run(name)]


def _sweep_runs(name: str) -> list[Path]:
    """The runs of a sweep. Raises UserError where there is none of this name."""
    for folder in run_folder.candidate_paths(name):
        if found := sorted(path.parent for path in folder.glob("*/recipe.yaml")):
            return found
    sweeps = sorted({path.parent.parent.name for path in run_folder.FOLDER.glob("*/*/recipe.yaml")})
    hint = (
        did_you_mean(name, sweeps) if sweeps else f"; there are none in {run_folder.FOLDER}/ (kilobatch submit --sweep)"
    )
    raise UserError(f"there is no sweep '{name}'{hint}")


def _read_state(folder: Path) -> run_folder.State | UserError | None:
    """Returns the state of a run; None without state.json; where the file is damaged the UserError itself, not raised,
    so that the other runs are still listed."""
    try:
        return run_folder.read_state(folder) if (folder / "state.json").exists() else None
    except UserError as error:
        return error


def _started(state: run_folder.State | UserError | None) -> str:
    return state.started if isinstance(state, run_folder.State) else ""


def _ended_long_ago(state: run_folder.State | UserError | None) -> bool:
    if not isinstance(state, run_folder.State) or state.status in ("queued", "running"):
        return False
    return datetime.fromisoformat(state.updated) < datetime.now(UTC) - RECENT


def _unfinished_job(folder: Path, state: run_folder.State | UserError | None) -> JobFile | None:
    """The job of a run that has not ended, whose scheduler knows more about it than the folder does."""
    if not isinstance(state, run_folder.State) or state.status not in ("queued", "running"):
        return None
    return job_history.read_job_file(folder)


def _query_schedulers(jobs: dict[Path, JobFile]) -> tuple[dict[Path, JobState], list[str]]:
    """The states of jobs, by one call to each scheduler, and a note for each scheduler that does not answer: the state
    of its runs is then what they wrote last."""
    found, notes = {}, []
    clusters: list[Literal["slurm", "local"]] = ["slurm", "local"]
    for cluster in clusters:
        ids = {folder: job.job_id for folder, job in jobs.items() if job.cluster == cluster and job.job_id}
        if not ids:
            continue
        try:
            states = scheduler_of(cluster).states(sorted(set(ids.values())))
        except UserError as error:
            notes.append(f"{error}; states are those that the runs wrote last")
            continue
        found |= {folder: states[job] for folder, job in ids.items()}
    return found, notes


def _row(folder: Path, state: run_folder.State | UserError | None, job: JobState | None) -> RunRow:
    name = str(folder.relative_to(run_folder.FOLDER)) if folder.is_relative_to(run_folder.FOLDER) else str(folder)
    if isinstance(state, UserError):
        return RunRow(run=name, state="damaged", problem=str(state))
    submitted, attempts, progress = (
        job_history.read_job_file(folder),
        job_history.read_attempts(folder),
        Progress.of(folder),
    )
    if state and submitted and job is None:  # being submitted, over, or of a scheduler that does not answer
        status = state.status
    else:
        status = run_folder.status(folder, job)
    row = RunRow(run=name, state=status, workers=state.workers if state else None)
    _add_job(row, submitted, job, attempts)
    if state and state.evaluation == "failed":
        record = read_final_evaluation(folder)
        why = f": {failures}" if record and (failures := record.failures()) else ""
        row.problem = f"trained, but its evaluation failed{why}; ask again with: kilobatch eval {folder}"
    _add_progress(row, progress)
    _add_checkpoint(row, folder)
    return row


def _add_job(row: RunRow, submitted: JobFile | None, job: JobState | None, attempts: list[Attempt]) -> None:
    if submitted:
        row.sweep, row.job, row.nodes = submitted.sweep, submitted.job_id or None, submitted.nodes
        if row.state == "queued":
            row.waiting = job.why if job else None if submitted.job_id else "being submitted"
    if row.state == "running":
        row.hosts = (job.nodes if job else "") or (",".join(attempts[-1].nodes) if attempts else None)
    row.requeues = job_history.count_ends(_requeued(attempts))
    last = attempts[-1] if attempts else None
    if last and row.state in ("failed", "interrupted"):
        row.rank, row.host, row.lines = last.rank, last.host, last.lines
        row.problem = ", ".join(filter(None, (last.reason, last.how, last.stopped))) or None


def _requeued(attempts: list[Attempt]) -> list[Attempt]:
    """The attempts that were requeued: by themselves, or by the scheduler, as the same job id of the next one shows."""
    next_jobs = [*(attempt.job for attempt in attempts[1:]), ""]
    return [
        attempt
        for attempt, next_job in zip(attempts, next_jobs, strict=False)
        if attempt.requeued or attempt.job == next_job
    ]


def _add_progress(row: RunRow, progress: Progress | None) -> None:
    if progress is None:
        return
    for name in ("epoch", "epochs", "step", "steps", "loss", "knn", "top1", "images_per_second", "data_wait"):
        setattr(row, name, getattr(progress, name))
    row.seen = time.time() - progress.time
    if row.state == "running" and progress.seconds_left is not None:
        row.eta = max(0.0, progress.seconds_left - row.seen)


def _add_checkpoint(row: RunRow, folder: Path) -> None:
    if checkpoints := list_checkpoints(folder / "checkpoints"):
        row.checkpoint_step = max(checkpoints)
        row.checkpoint_age = time.time() - checkpoints[row.checkpoint_step].stat().st_mtime


def _sort_key(row: RunRow) -> tuple[bool, float, float]:
    """The key that puts the best run first: by top-1 of its classifier or of k-NN, else by loss; others come last."""
    loss = float("inf") if row.loss is None else row.loss
    accuracy = row.knn if row.top1 is None else row.top1
    return (accuracy is None, -(accuracy or 0.0), loss)
