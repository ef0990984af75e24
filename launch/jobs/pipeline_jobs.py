"""Pipelines as jobs of which each waits for the one before to finish. Loads no torch."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from kilobatch.data.errors import Refusal
from kilobatch.data.files import discard
from kilobatch.launch.jobs import cluster, sbatch
from kilobatch.launch.jobs import code_snapshot as snapshot
from kilobatch.launch.jobs import local_queue as local
from kilobatch.launch.jobs import submit as submitting
from kilobatch.launch.jobs.cluster import KIND, Cluster
from kilobatch.launch.pipelines import pipeline
from kilobatch.launch.pipelines.stages import Plan, check_all, make
from kilobatch.launch.recipes import recipe
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.recipes.references import begun
from kilobatch.launch.recipes.settings import Settings
from kilobatch.launch.runs import job_history as ledger
from kilobatch.launch.runs import run_folder as runs
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.launch.schedulers.select import scheduler_of


def submit(planned: Plan, given: str | None, resources: dict[str, Any], dry_run: bool) -> None:
    """Queues a job for each stage; given, resources: as cluster.choose takes them. Raises Refusal before anything is
    made; where the scheduler refuses, what was made is removed."""
    kind, asked = cluster.choose(given, resources)
    check_all(planned, partial(_check, kind, asked))
    if dry_run:
        print(_dry(kind, asked, planned), end="")
        return
    submitting.refuse_unqueued(kind, planned.top)
    stages = make(planned, asked.nodes * asked.workers)
    try:
        ids = submitting.queue(kind, asked, planned.top, stages, snapshot.take(planned.top / "code"), chained=True)
    except Refusal:
        discard(planned.top)
        raise
    _tell(planned.top, stages, ids)


def resubmit(top: Path, given: str | None, resources: dict[str, Any]) -> None:
    """Queues the stages that have not finished, with today's code, and the same resources but for those given.

    Where the first of them is a job of SLURM still, as after `kilobatch resume` of that stage alone, the others are
    queued behind it. Raises Refusal where none is left to queue.
    """
    waiting = [stage for stage in pipeline.folders(top) if runs.status(stage) != "finished"]
    files = {stage: file for stage in pipeline.folders(top) if (file := ledger.job_file(stage))}
    kind, asked = _resources(top, files, given, resources)
    is_open = _open(waiting, files)
    after: str | None = None
    if waiting[0] in is_open:
        first, *waiting = waiting
        after = files[first].job_id
        if kind == "local" or all(stage in is_open for stage in waiting):
            raise Refusal(f"{first} is {runs.status(first)} as job {after}; kilobatch cancel {top} ends it")
    for stage in waiting:
        chosen, settings = recipe.load(stage / "recipe.yaml")
        submitting.check_fit(chosen, settings, kind, asked, _recipes(top), begun(stage))
    submitting.refuse_unqueued(kind, top)
    for stage in waiting:  # what waits for a job that is over waits for ever
        if stage in is_open:
            scheduler_of(files[stage].cluster).cancel([files[stage].job_id])
    ids = submitting.queue(kind, asked, top, waiting, snapshot.take(top / "code"), chained=True, after=after)
    _tell(top, waiting, ids)


def _resources(
    top: Path, files: dict[Path, JobFile], given: str | None, resources: dict[str, Any]
) -> tuple[KIND, Cluster]:
    if given is None and files:
        stage, file = list(files.items())[-1]
        return file.cluster, cluster.again(file.cluster, stage / "cluster.yaml", resources)
    return cluster.choose(given, resources)


def _open(stages: list[Path], files: dict[Path, JobFile]) -> set[Path]:
    """Those whose jobs may still run."""
    found: set[Path] = set()
    kinds: tuple[KIND, KIND] = ("slurm", "local")
    for kind in kinds:
        jobs = {stage: files[stage].job_id for stage in stages if stage in files and files[stage].cluster == kind}
        if jobs:
            states = scheduler_of(kind).states(list(jobs.values()))
            found |= {stage for stage, job in jobs.items() if states[job].open}
    return found


def _check(kind: KIND, asked: Cluster, chosen: Recipe, settings: Settings, awaited: Mapping[str, Recipe]) -> None:
    submitting.check_fit(chosen, settings, kind, asked, awaited)


def _recipes(top: Path) -> dict[str, Recipe]:
    """Of stages that may not have begun, by their folders."""
    return {str(stage.absolute()): recipe.load(stage / "recipe.yaml")[0] for stage in pipeline.folders(top)}


def _dry(kind: KIND, asked: Cluster, planned: Plan) -> str:
    code, runs_of = planned.top / "code" / "001", [planned.top / stage.name for stage in planned.stages]
    if kind == "local":
        return local.command(runs_of, code) + "\n"
    texts, after = [], None
    for run in runs_of:
        texts.append(sbatch.script(asked, f"{planned.top.name}-{run.name}", run / "submitit", code, 1, after))
        after = f"JOB-OF-{run.name}"
    return "\n".join(texts)


def _tell(top: Path, stages: list[Path], ids: list[str]) -> None:
    print(f"pipeline: {top}")
    for k, (stage, job) in enumerate(zip(stages, ids, strict=True)):
        print(f"{stage.name}: job {job}" + (f", after {stages[k - 1].name}" if k else ""))
    print(f"kilobatch status {top}, kilobatch logs {stages[0]}, kilobatch cancel {top}", flush=True)
