"""Submits the stages of a pipeline as jobs, each of which waits until the one before has finished. Loads no torch."""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from kilobatch.data.errors import UserError
from kilobatch.data.files import discard
from kilobatch.launch.jobs import local_queue, sbatch
from kilobatch.launch.jobs.cluster import Cluster, ClusterKind, choose_cluster, cluster_again
from kilobatch.launch.jobs.code_snapshot import take_snapshot
from kilobatch.launch.jobs.lost_submission import known_job
from kilobatch.launch.jobs.submit import check_fit, check_submittable, compare_with_beginning, queue_runs
from kilobatch.launch.pipelines.pipeline import stage_folders
from kilobatch.launch.pipelines.stages import PipelinePlan, check_stages, create_runs
from kilobatch.launch.processes.output import say
from kilobatch.launch.recipes.continuation import Continuation, refuse_missing_data
from kilobatch.launch.recipes.recipe import Recipe, load_recipe
from kilobatch.launch.recipes.references import begun
from kilobatch.launch.recipes.settings import Settings
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.former_records import FormerRecords, put_back_if_refused
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.launch.schedulers.scheduler import NoAnswer
from kilobatch.launch.schedulers.select import scheduler_of


def submit_pipeline(
    planned: PipelinePlan, cluster_name: str | None, resources: dict[str, Any], dry_run: bool, anyway: bool
) -> None:
    """Queues a job for each stage. cluster_name, resources: as choose_cluster takes them; anyway: as `submit` does.

    Raises UserError before anything is created; where the scheduler refuses, all that was created is removed.
    """
    kind, cluster = choose_cluster(cluster_name, resources)
    check_stages(planned, partial(_check, kind, cluster))
    if dry_run:
        print(_dry_run_text(kind, cluster, planned), end="")
        return
    check_submittable(kind, planned.top)
    stages = create_runs(planned, cluster.nodes * cluster.workers)
    try:
        code = take_snapshot(planned.top / "code")
        ids = queue_runs(kind, cluster, planned.top, stages, code, chained=True, anyway=anyway)
    except NoAnswer as error:  # the job may come, and needs the folders
        raise _unknown_submission(planned.top, stages, error) from error
    except (UserError, OSError):
        discard(planned.top)
        raise
    _print_jobs(planned.top, stages, ids)


def resubmit_pipeline(
    top: Path,
    cluster_name: str | None,
    resources: dict[str, Any],
    continuation: Continuation,
    anyway: bool = False,
) -> None:
    """Queues the stages that have not finished, with the present code and the former resources except for those given.

    Where the first of them still has a job in SLURM, as after `kilobatch resume` of that stage alone, the others are
    queued behind that job; and likewise where SLURM has not answered the submission of one of them. Raises UserError
    where no stage is left to queue.
    """
    files = {stage: file for stage in stage_folders(top) if (file := known_job(stage))}
    waiting = [stage for stage in stage_folders(top) if run_folder.status(stage) != "finished"]
    kind, cluster = _resources(files, cluster_name, resources)
    is_open = _with_open_jobs(waiting, files)
    queued: list[Path] = []  # one behind the other; a job from before the one that it should wait for waits for another
    while waiting and waiting[0] in is_open and (not queued or _is_behind(files[waiting[0]], files[queued[-1]])):
        queued.append(waiting.pop(0))
    if queued and (kind == "local" or all(stage in is_open for stage in waiting)):
        first, job = queued[0], files[queued[0]].job_id
        raise UserError(f"{first} is {run_folder.status(first)} as job {job}; kilobatch cancel {top} ends it")
    after = files[queued[-1]].job_id if queued else None
    recipes: dict[Path, Recipe] = {}
    for stage in waiting:
        recipes[stage], settings = continuation.read(stage)
        refuse_missing_data(stage, recipes[stage], settings, "resume")
        check_fit(recipes[stage], settings, kind, cluster, _recipes(top), begun(stage))
    check_submittable(kind, top)
    writes = {stage: compare_with_beginning(stage, recipe, continuation) for stage, recipe in recipes.items()}
    with ExitStack() as stack:  # until the jobs are queued; one that begins waits
        for stage in waiting:
            stack.enter_context(run_folder.locked(stage))
        for stage in waiting:
            stack.enter_context(put_back_if_refused(FormerRecords(stage)))
        for stage in waiting:
            writes[stage]()
        for stage in waiting:  # their jobs wait for one that is over, and so would never begin
            if stage in is_open:
                scheduler_of(files[stage].cluster).cancel([files[stage].job_id])
        code = take_snapshot(top / "code")
        try:
            ids = queue_runs(kind, cluster, top, waiting, code, chained=True, after=after, anyway=anyway)
        except NoAnswer as error:
            raise _unknown_submission(top, waiting, error) from error
        except (UserError, OSError):
            shutil.rmtree(code)
            raise
    _print_jobs(top, waiting, ids)


def _is_behind(file: JobFile, first: JobFile) -> bool:
    """Whether a job was submitted together with the one of the stage before it, or later, and so waits for it."""
    return file.submitted >= first.submitted


def _unknown_submission(top: Path, stages: list[Path], error: NoAnswer) -> NoAnswer:
    """The message for a stage of which SLURM does not tell whether it is queued."""
    jobs = [file.job_id if (file := job_history.read_job_file(stage)) else None for stage in stages]
    unknown = jobs.index("")
    known = [f"{stage.name} is job {job}" for stage, job in zip(stages[:unknown], jobs, strict=False)]
    unsent = [f"{stage.name} was not submitted" for stage in stages[unknown + 1 :]]
    others = "".join(f"; {text}" for text in (*known, *unsent))
    return NoAnswer(
        f"it is not known whether the job of {stages[unknown]} is queued: {error}{others}; once SLURM answers, "
        f"kilobatch resume {top} looks for that job, and queues what is not"
    )


def _resources(
    files: dict[Path, JobFile], cluster_name: str | None, resources: dict[str, Any]
) -> tuple[ClusterKind, Cluster]:
    if cluster_name is None and files:
        stage, file = list(files.items())[-1]
        return file.cluster, cluster_again(file.cluster, stage / "cluster.yaml", resources)
    return choose_cluster(cluster_name, resources)


def _with_open_jobs(stages: list[Path], files: dict[Path, JobFile]) -> set[Path]:
    """The stages whose jobs are queued or running."""
    found: set[Path] = set()
    kinds: tuple[ClusterKind, ClusterKind] = ("slurm", "local")
    for kind in kinds:
        jobs = {stage: files[stage].job_id for stage in stages if stage in files and files[stage].cluster == kind}
        if jobs:
            states = scheduler_of(kind).states(list(jobs.values()))
            found |= {stage for stage, job in jobs.items() if states[job].open}
    return found


def _check(
    kind: ClusterKind, cluster: Cluster, recipe: Recipe, settings: Settings, awaited: Mapping[str, Recipe]
) -> None:
    check_fit(recipe, settings, kind, cluster, awaited)


def _recipes(top: Path) -> dict[str, Recipe]:
    """The recipe of each stage, by its folder. A later stage is checked against them, as an earlier one may not have
    begun."""
    return {str(stage.absolute()): load_recipe(stage / "recipe.yaml")[0] for stage in stage_folders(top)}


def _dry_run_text(kind: ClusterKind, cluster: Cluster, planned: PipelinePlan) -> str:
    code, runs = planned.top / "code" / "001", [planned.top / stage.name for stage in planned.stages]
    if kind == "local":
        return local_queue.command(runs, code) + "\n"
    texts, after = [], None
    for run in runs:
        texts.append(sbatch.script(cluster, f"{planned.top.name}-{run.name}", run / "submitit", code, 1, after))
        after = f"JOB-OF-{run.name}"
    return "\n".join(texts)


def _print_jobs(top: Path, stages: list[Path], ids: list[str]) -> None:
    say(f"pipeline: {top}")
    for k, (stage, job) in enumerate(zip(stages, ids, strict=True)):
        say(f"{stage.name}: job {job}" + (f", after {stages[k - 1].name}" if k else ""))
    say(f"kilobatch status {top}, kilobatch logs {stages[0]}, kilobatch cancel {top}")
