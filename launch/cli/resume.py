"""`kilobatch resume` and `cancel` of runs that were submitted. Loads no torch."""

import shutil
from pathlib import Path
from typing import Any, Literal

from kilobatch.data.errors import Refusal
from kilobatch.data.files import write_whole
from kilobatch.launch.cli import pipeline as pipeline_runs
from kilobatch.launch.jobs import cluster
from kilobatch.launch.jobs import code_snapshot as snapshot
from kilobatch.launch.jobs import submit as submitting
from kilobatch.launch.pipelines import pipeline
from kilobatch.launch.recipes import recipe
from kilobatch.launch.recipes.references import begun
from kilobatch.launch.runs import job_history as ledger
from kilobatch.launch.runs import run_folder as runs
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.launch.schedulers.select import scheduler_of


def resume(run: str, workers: int | None, given: str | None, resources: dict[str, Any]) -> int:
    """Goes on from the newest whole checkpoint: as a job where the run was one or a cluster is named, with the same
    resources but for those that are given; else, or with `workers`, here. Returns the exit code.

    Raises Refusal where the run has finished, or is still queued or running.
    """
    if (top := pipeline.find(run)) is not None:
        return pipeline_runs.resume(top, workers, given, resources)
    folder = runs.find(run)
    submitted = ledger.job_file(folder)
    on_cluster = cluster.named(workers, given, resources, "goes on")
    _refuse_open(folder, submitted)
    if workers is None and (submitted or on_cluster):
        _submit(folder, submitted, given, resources)
        return 0
    from kilobatch.launch.cli import train as training

    return training.resume(run, workers)


def _refuse_open(folder: Path, submitted: JobFile | None) -> None:
    status = runs.status(folder)
    if status == "finished":
        raise Refusal(f"{folder} has finished; nothing is left to resume (kilobatch eval {folder}, or export)")
    if submitted and status in ("queued", "running"):
        raise Refusal(f"{folder} is {status} as job {submitted.job_id}; kilobatch cancel {folder} ends it")
    if (why := pipeline.too_early(folder)) is not None:
        raise Refusal(why)


def _submit(folder: Path, submitted: JobFile | None, given: str | None, resources: dict[str, Any]) -> None:
    if submitted and given is None:
        kind = submitted.cluster
        asked = cluster.again(kind, folder / "cluster.yaml", resources)
    else:
        kind, asked = cluster.choose(given, resources)
    chosen, settings = recipe.load(folder / "recipe.yaml")
    submitting.check_fit(chosen, settings, kind, asked, begun=begun(folder))
    submitting.refuse_unqueued(kind, folder)
    paths = [folder / name for name in ("cancelled", "cluster.yaml", "job.json", "state.json")]
    before = {path: path.read_bytes() if path.exists() else None for path in paths}
    code = snapshot.take(folder / "code")
    try:
        ids = submitting.queue(kind, asked, folder, [folder], code)
    except Refusal:
        for path, content in before.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                write_whole(path, [content])
        shutil.rmtree(code)
        raise
    submitting.tell(folder, ids, asked)


def cancel(names: list[str]) -> None:
    """Ends the jobs of runs, queued or running, for good; the name of a sweep or pipeline stands for all its runs.

    A running job saves first, and `resume` goes on from there. Raises Refusal for a run that is no job.
    """
    folders = [folder for name in names for folder in _runs_of(name)]
    files = [_job_of(folder) for folder in folders]
    by_kind: dict[Literal["slurm", "local"], list[tuple[Path, JobFile]]] = {}
    for folder, file in zip(folders, files, strict=True):
        by_kind.setdefault(file.cluster, []).append((folder, file))
    for kind, jobs in by_kind.items():
        scheduler = scheduler_of(kind)
        states = scheduler.states([file.job_id for _, file in jobs])
        open_jobs = [(folder, file) for folder, file in jobs if states[file.job_id].open]
        for folder, _ in open_jobs:  # the job looks for it when it is told to stop: not to be requeued
            write_whole(folder / "cancelled", [ledger.now().encode()])
        scheduler.cancel([file.job_id for _, file in open_jobs])
        for folder, file in jobs:
            state = states[file.job_id]
            if state.state == "queued":  # no job will ever say so
                runs.set_status(folder, "cancelled", file.nodes * file.workers_per_node)
            end = "cancelled" if state.open else f"was over already ({runs.status(folder, state)})"
            print(f"{folder}: job {file.job_id} {end}")


def _runs_of(name: str) -> list[Path]:
    """The run, the points of the sweep, or the stages of the pipeline."""
    for folder in runs.places(name):
        points = sorted(folder.glob("*/job.json")) or sorted(folder.glob("*/recipe.yaml"))
        if not (folder / "recipe.yaml").exists() and points:
            return [point.parent for point in points]
    return [runs.find(name)]


def _job_of(folder: Path) -> JobFile:
    file = ledger.job_file(folder)
    if file is None:
        now = runs.state(folder)
        where = f"; it runs here, as process {now.pid} on {now.host}" if runs.status(folder) == "running" else ""
        raise Refusal(f"{folder} was not submitted, so there is no job to cancel{where}")
    return file
