"""`kilobatch pipeline`, and `kilobatch resume` of a pipeline: runs its stages one after another on this machine, or
submits them as jobs of a cluster.

Whatever loads torch is imported in the functions that need it, so that a wrong recipe is refused at once.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from kilobatch.data.errors import UserError
from kilobatch.launch.jobs.cluster import names_cluster
from kilobatch.launch.jobs.pipeline_jobs import resubmit_pipeline, submit_pipeline
from kilobatch.launch.pipelines.pipeline import stage_folders, take_from_own_stages
from kilobatch.launch.pipelines.results import conclude, read_results
from kilobatch.launch.pipelines.stages import (
    PipelinePlan,
    PipelineRequest,
    check_stages,
    create_runs,
    naming_stage,
    plan_pipeline,
)
from kilobatch.launch.processes.output import say, tell
from kilobatch.launch.recipes.checks import check
from kilobatch.launch.recipes.continuation import Continuation
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.recipes.settings import Settings
from kilobatch.launch.runs import job_history, run_folder


def start_pipeline(
    request: PipelineRequest,
    name: str | None,
    workers: int | None,
    cluster_name: str | None,
    resources: dict[str, Any],
    dry_run: bool,
    anyway: bool,
) -> int:
    """Creates a pipeline and runs its stages on this machine, or as jobs where a cluster or resources are given.

    Returns the exit code. Raises UserError before anything is created, for an error in the last stage as well.
    """
    planned = plan_pipeline(request, name)
    for note in planned.notes:
        tell(note)
    if names_cluster(workers, cluster_name, resources, "trains"):
        submit_pipeline(planned, cluster_name, resources, dry_run, anyway)
        return 0
    workers = _check(planned, workers)
    if dry_run:
        for stage in planned.stages:
            say(f"# {stage.name}: {planned.top / stage.name}\n{stage.recipe.dump_yaml()}")
        tell(f"kilobatch: nothing was created; it would train in {planned.top}")
        return 0
    _prepare(planned, workers)
    create_runs(planned, workers)
    say(f"pipeline: {planned.top}")
    return _run_stages(planned.top, workers, Continuation(), anyway)


def _check(planned: PipelinePlan, workers: int | None) -> int:
    """Checks every stage's recipe before the first begins. Returns the number of workers."""
    if workers is None:
        from kilobatch.launch.worker.devices import default_workers

        workers = default_workers(planned.stages[0].recipe)
    check_stages(planned, partial(_check_stage, workers))
    return workers


def _prepare(planned: PipelinePlan, workers: int) -> None:
    """Checks the device of every stage, and prepares its data, before the first begins."""
    from kilobatch.launch.recipes.data import prepare_data
    from kilobatch.launch.worker.devices import check_device

    for stage in planned.stages:
        with naming_stage(stage.name):
            check_device(stage.recipe, workers)
            prepare_data(stage.recipe)


def _check_stage(workers: int, recipe: Recipe, settings: Settings, awaited: Mapping[str, Recipe]) -> None:
    check(recipe, workers, settings, awaited=awaited)


def resume_pipeline(
    top: Path,
    workers: int | None,
    cluster_name: str | None,
    resources: dict[str, Any],
    continuation: Continuation,
    anyway: bool,
) -> int:
    """Continues a pipeline at the first stage that has not finished. Returns the exit code.

    Its stages become jobs where they were jobs before or a cluster is named, unless `workers` is given; else they run
    on this machine. Raises UserError where all stages have finished, or one is queued or running, and for overrides,
    which are of one stage.
    """
    stages = stage_folders(top)
    if continuation.overrides:
        where = f"name a stage of {top}, such as {stages[0]}"
        raise UserError(f"override '{continuation.overrides[0]}' is for one run; {where}")
    states = {stage: run_folder.status(stage) for stage in stages}
    if set(states.values()) == {"finished"}:
        if not read_results(top):  # killed before the results were written
            conclude(top)
            return 0
        raise UserError(f"{top} has finished; kilobatch status {top} shows its table again")
    for change in take_from_own_stages(top):
        tell(f"kilobatch: {top} is the copy of a pipeline, or was moved: {change}")
    submitted = any(job_history.read_job_file(stage) for stage in stages)
    if names_cluster(workers, cluster_name, resources, "trains") or (submitted and workers is None):
        resubmit_pipeline(top, cluster_name, resources, continuation, anyway)
        return 0
    if busy := [stage for stage, state in states.items() if state in ("queued", "running")]:
        advice = f"kilobatch cancel {top} ends it" if job_history.read_job_file(busy[0]) else "stop that one first"
        raise UserError(f"{busy[0]} is {states[busy[0]]}; {advice}")
    return _run_stages(top, workers, continuation, anyway)


def _run_stages(top: Path, workers: int | None, continuation: Continuation, anyway: bool) -> int:
    """Runs the stages that have not finished, in order. Returns the exit code of the first that does not end well."""
    from kilobatch.launch.cli import train

    for stage in stage_folders(top):
        state = run_folder.status(stage)
        if state == "finished":
            tell(f"{stage.name}: finished before")
            continue
        tell(f"{stage.name}: {stage}" + ("" if state == "new" else f" ({state} before)"))
        code = train.resume(str(stage), workers, continuation, anyway=anyway, stage=True)
        if code != train.FINISHED:
            return code
    conclude(top)
    return train.FINISHED
