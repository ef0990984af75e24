"""Collects the state of runs from their folders and from one query to each scheduler. Loads no torch."""

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from kilobatch.data.errors import UserError
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.final_evaluation import read_final_evaluation
from kilobatch.launch.runs.job_history import Attempt, JobFile
from kilobatch.launch.runs.records import Records, read_records
from kilobatch.launch.runs.run_folder import State
from kilobatch.launch.runs.run_row import RunRow
from kilobatch.launch.schedulers.scheduler import JobState
from kilobatch.launch.schedulers.select import scheduler_of
from kilobatch.trainer.checkpoint.description import list_checkpoints
from kilobatch.trainer.evaluate.baselines.baselines_file import read_baselines
from kilobatch.trainer.monitor.progress_file import Progress

SKEW = 10.0  # seconds by which clocks may differ without a word
COPIED = (
    "epoch",
    "epochs",
    "step",
    "steps",
    "loss",
    "knn",
    "knn_sample",
    "top1",
    "images_per_second",
    "data_wait",
    "notes",
)
RECENT = timedelta(days=7)  # runs that ended longer ago are listed only when the user names them


@dataclass(frozen=True)
class Overview:
    """notes: schedulers that did not answer; older: how many runs were left out."""

    rows: list[RunRow]
    notes: list[str]
    older: int = 0


def overview(names: Sequence[str], *, best_first: bool = False, everything: bool = False) -> Overview:
    """The state of the runs and folders of runs, such as sweeps, that are named, or of all runs under runs/ (oldest
    first); of these, runs that ended long ago are left out unless `everything`.

    Raises UserError for a name that is no run and no folder of runs.
    """
    if names:
        folders = [folder for name in names for folder in _find_runs(name)]
    else:
        folders = sorted(_runs_in(run_folder.FOLDER))
    states = {folder: _read_state(folder) for folder in folders}
    listed = folders
    if not (names or everything):
        since = _newest_activity(states.values()) - RECENT
        listed = [folder for folder in folders if not _ended_before(since, states[folder])]
    found = {folder: _read(folder) for folder in listed}
    jobs, notes = _query_schedulers({folder: job for folder in listed if (job := _unfinished_job(found[folder]))})
    rows = {folder: _row(folder, found[folder], jobs.get(folder)) for folder in listed}
    if ahead := [row.run for row in rows.values() if row.step is not None and row.seen is None]:
        more = f" and {len(ahead) - 3} more" if len(ahead) > 3 else ""
        notes.append(f"{', '.join(ahead[:3])}{more}: written by a clock ahead of this machine's; ages are left out")
    if best_first:
        listed = sorted(listed, key=lambda folder: _sort_key(rows[folder]))
    elif not names:
        listed = sorted(listed, key=lambda folder: _started(states[folder]))
    return Overview([rows[folder] for folder in listed], notes, older=len(folders) - len(listed))


def _runs_in(parent: Path) -> list[Path]:
    """The runs in a folder, and those in the sweeps in it."""
    found: list[Path] = []
    for folder in parent.iterdir() if parent.is_dir() else ():
        if folder.name.startswith("."):  # a branch that is being made
            continue
        if _may_be_run(folder):
            found.append(folder)
        elif folder.is_dir():
            found += _points_in(folder)
    return found


def _points_in(folder: Path) -> list[Path]:
    """The runs in the folder of a sweep or a pipeline; none for a folder that is not there, or may not be listed."""
    try:
        return sorted(path for path in folder.iterdir() if _may_be_run(path)) if folder.is_dir() else []
    except PermissionError:
        return []


def _may_be_run(folder: Path) -> bool:
    """Whether a folder is a run. One that may not be read, as another user's, counts, and so does one that has lost its
    recipe: its row says so."""
    try:
        return (folder / "recipe.yaml").is_file() or (folder / "state.json").exists()
    except PermissionError:
        return True


def _find_runs(name: str) -> list[Path]:
    """The run of this name, or the runs in the folder of this name. Raises UserError."""
    for folder in run_folder.candidate_paths(name):
        if _may_be_run(folder):
            return [folder]
        if found := sorted(_runs_in(folder)):
            return found
    sweeps = {path.parent.parent.name for path in run_folder.FOLDER.glob("*/*/recipe.yaml")}
    return [run_folder.find_run(name, sweeps)]


def _read_state(folder: Path) -> State | None:
    """The state of a run; None where there is none, or it is damaged: `_read` says so."""
    try:
        return run_folder.read_state(folder)
    except (UserError, OSError):
        return None


def _started(state: State | None) -> str:
    return state.started if state else ""


def _newest_activity(states: Iterable[State | None]) -> datetime:
    """The newest time that a run wrote, or now, whichever is earlier: where this machine's clock is ahead, no run seems
    to have ended long ago."""
    now = datetime.now(UTC)
    return min(now, max((datetime.fromisoformat(state.updated) for state in states if state), default=now))


def _ended_before(since: datetime, state: State | None) -> bool:
    if state is None or state.status in ("queued", "running"):
        return False
    return datetime.fromisoformat(state.updated) < since


def _read(folder: Path) -> Records | UserError:
    """The records of a run; where one is damaged the UserError itself, not raised, so that the other runs are still
    listed."""
    try:
        return read_records(folder)
    except UserError as error:
        return error


def _unfinished_job(found: Records | UserError) -> JobFile | None:
    """The job of a run that has not ended, whose scheduler knows more about it than the folder does."""
    if isinstance(found, UserError) or found.state is None or found.state.status not in ("queued", "running"):
        return None
    return found.job


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


def _row(folder: Path, found: Records | UserError, job: JobState | None) -> RunRow:
    name = str(folder.relative_to(run_folder.FOLDER)) if folder.is_relative_to(run_folder.FOLDER) else str(folder)
    if isinstance(found, UserError):
        return RunRow(run=name, state="damaged", problem=str(found))
    state, submitted = found.state, found.job
    submitting = state and state.status == "queued"
    if state and submitted and job is None and (submitted.job_id or submitting) and not submitted.original:
        status = state.status  # it is being submitted, over, or of a scheduler that does not answer
    else:
        status = run_folder.status(folder, job)
    row = RunRow(run=name, state=status, workers=state.workers if state else None, baselines=read_baselines(folder))
    _add_job(row, submitted, job, found.attempts)
    if state and state.evaluation == "failed":
        record = read_final_evaluation(folder)
        why = f": {failures}" if record and (failures := record.failures()) else ""
        row.problem = f"trained, but its evaluation failed{why}; ask again with: kilobatch eval {folder}"
    _add_progress(row, Progress.of(folder))
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
    if submitted and submitted.original:
        row.problem = "; ".join(filter(None, (str(submitted.original), row.problem)))


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
    for name in COPIED:
        setattr(row, name, getattr(progress, name))
    row.seen, left = _age(progress.time), progress.seconds_left
    if row.state == "running" and left is not None and math.isfinite(left):
        # A report cannot be older than what was left then, unless the clocks differ.
        row.eta = left - row.seen if row.seen is not None and row.seen < left else left


def _add_checkpoint(row: RunRow, folder: Path) -> None:
    if checkpoints := list_checkpoints(folder / "checkpoints"):
        row.checkpoint_step = max(checkpoints)
        with suppress(FileNotFoundError):  # removed just now, since there is a newer one
            row.checkpoint_age = _age(checkpoints[row.checkpoint_step].stat().st_mtime)


def _age(written: float) -> float | None:
    """Seconds since a time that a machine wrote; None where that is ahead of this machine's clock."""
    seconds = time.time() - written
    return max(0.0, seconds) if seconds > -SKEW and math.isfinite(seconds) else None


def _sort_key(row: RunRow) -> tuple[bool, float, float]:
    """The key that puts the best run first: by top-1 of its classifier or of k-NN, else by loss; others come last."""
    loss = float("inf") if row.loss is None else row.loss
    accuracy = row.knn if row.top1 is None else row.top1
    return (accuracy is None, -(accuracy or 0.0), loss)
