"""`kilobatch pipeline`, and `resume` of one: its stages one after another on this machine, or as jobs of a cluster.

What imports torch stands in the functions that need it, so that a bad recipe is refused before it is loaded.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from kilobatch.data.errors import Refusal
from kilobatch.launch.jobs import cluster, pipeline_jobs
from kilobatch.launch.pipelines import pipeline
from kilobatch.launch.pipelines.results import conclude, read
from kilobatch.launch.pipelines.stages import Asked, Plan, check_all, make, of_stage, plan
from kilobatch.launch.processes.output import tell
from kilobatch.launch.recipes.checks import check
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.recipes.settings import Settings
from kilobatch.launch.runs import job_history as ledger
from kilobatch.launch.runs import run_folder as runs


def start(
    asked: Asked, name: str | None, workers: int | None, given: str | None, resources: dict[str, Any], dry_run: bool
) -> int:
    """Makes a pipeline's folder and runs its stages here, or as jobs where a cluster or resources are named.

    Raises Refusal before anything is made, for what is wrong in the last stage, too. Returns the exit code.
    """
    planned = plan(asked, name)
    if cluster.named(workers, given, resources, "trains"):
        pipeline_jobs.submit(planned, given, resources, dry_run)
        return 0
    if dry_run:
        raise Refusal("--dry-run prints what a scheduler would get; name one: --cluster, or --cluster local")
    workers = _check(planned, workers)
    make(planned, workers)
    print(f"pipeline: {planned.top}", flush=True)
    return _go_on(planned.top, workers)


def _check(planned: Plan, workers: int | None) -> int:
    """Every stage, before the first begins: recipes, devices, and that its images can be had. Returns the workers."""
    if workers is None:
        from kilobatch.launch.worker.devices import default_workers

        workers = default_workers(planned.stages[0].recipe)
    check_all(planned, partial(_check_one, workers))
    from kilobatch.launch.recipes.data import prepare_data
    from kilobatch.launch.worker.devices import check_device

    for stage in planned.stages:
        with of_stage(stage.name):
            check_device(stage.recipe, workers)
            prepare_data(stage.recipe)
    return workers


def _check_one(workers: int, recipe: Recipe, settings: Settings, awaited: Mapping[str, Recipe]) -> None:
    check(recipe, workers, settings, awaited=awaited)


def resume(top: Path, workers: int | None, given: str | None, resources: dict[str, Any]) -> int:
    """Goes on with the first stage that has not finished: as jobs where its stages were jobs or a cluster is named;
    else, or with `workers`, here. Returns the exit code.

    Raises Refusal where all have finished, or one is queued or running.
    """
    stages = pipeline.folders(top)
    states = {stage: runs.status(stage) for stage in stages}
    if set(states.values()) == {"finished"}:
        if not read(top):  # it was killed before it could tell
            conclude(top)
            return 0
        raise Refusal(f"{top} has finished; kilobatch status {top} shows its table again")
    submitted = any(ledger.job_file(stage) for stage in stages)
    if cluster.named(workers, given, resources, "trains") or (submitted and workers is None):
        pipeline_jobs.resubmit(top, given, resources)
        return 0
    if busy := [stage for stage, state in states.items() if state in ("queued", "running")]:
        way = f"kilobatch cancel {top} ends it" if ledger.job_file(busy[0]) else "stop that one first"
        raise Refusal(f"{busy[0]} is {states[busy[0]]}; {way}")
    return _go_on(top, workers)


def _go_on(top: Path, workers: int | None) -> int:
    """Runs the stages that have not finished, in order. Returns the exit code of the first that does not end well."""
    from kilobatch.launch.cli import train as training

    for stage in pipeline.folders(top):
        state = runs.status(stage)
        if state == "finished":
            tell(f"{stage.name}: finished before")
            continue
        tell(f"{stage.name}: {stage}" + ("" if state == "new" else f" ({state} before)"))
        code = training.resume(str(stage), workers)
        if code != training.FINISHED:
            tell(f"kilobatch: the pipeline ends in {stage.name}; go on with it by: kilobatch resume {top}")
            return code
    conclude(top)
    return training.FINISHED
