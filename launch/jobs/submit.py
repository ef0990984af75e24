"""`kilobatch submit`: checks a recipe or all points of a sweep, creates run folders and a copy of the code, and queues
the jobs. Loads no torch."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kilobatch.data.errors import UserError
from kilobatch.data.files import discard, write_whole
from kilobatch.launch.jobs import code_snapshot, local_queue, sbatch
from kilobatch.launch.jobs.cluster import Cluster, ClusterKind, choose_cluster, lead_seconds
from kilobatch.launch.processes.output import say, tell
from kilobatch.launch.recipes import sweep
from kilobatch.launch.recipes.checks import check
from kilobatch.launch.recipes.continuation import Continuation
from kilobatch.launch.recipes.data import prepare_data, with_absolute_paths
from kilobatch.launch.recipes.overrides import with_name
from kilobatch.launch.recipes.recipe import Recipe, read_recipe
from kilobatch.launch.recipes.settings import Settings
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.former_records import FormerRecords
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.launch.schedulers.environment import left_out_options
from kilobatch.launch.schedulers.scheduler import NoAnswer


def submit(
    name: str,
    overrides: list[str],
    sweeps: list[str],
    run_name: str | None,
    cluster_name: str | None,
    resources: dict[str, Any],
    dry_run: bool,
    anyway: bool = False,
) -> list[Path]:
    """Queues a job for a recipe, or an array of jobs for a sweep of it.

    run_name: None for the recipe's name and the time; cluster_name, resources: as choose_cluster takes them; dry_run:
    print what would be given to the scheduler, and create nothing; anyway: the job trains even if the plan, which is
    asked on its first node, says that it cannot fit into memory. Returns the runs' folders. Raises UserError before
    anything is created; where the scheduler refuses, all that was created is removed.
    """
    kind, cluster = choose_cluster(cluster_name, resources)
    overrides = with_name(overrides, run_name)
    points = sweep.points(sweeps)
    recipes = [_read(name, [*overrides, *point.changes], kind, cluster) for point in points]
    top = run_folder.new_run_path(recipes[0].run, Path(name).stem)
    names = [point.name for point in points] if sweeps else []
    if dry_run:
        print(_dry_run_text(kind, cluster, top, names), end="")
        return []
    check_submittable(kind, top)
    folders = _create_runs(top, names, recipes, Path(name).stem, cluster)
    try:
        code = code_snapshot.take_snapshot(top / "code")
        ids = queue_runs(kind, cluster, top, folders, code, anyway=anyway)
    except NoAnswer as error:  # the job may come, and needs the folders
        raise unknown_submission(top, folders, error) from error
    except (UserError, OSError):
        discard(top)
        raise
    print_submission(top, ids, cluster)
    return folders


def _read(name: str, overrides: list[str], kind: ClusterKind, cluster: Cluster) -> Recipe:
    """The recipe, checked against the resources, with absolute paths to its data: the job, and the command that resumes
    it, may be started in another folder."""
    recipe, settings = read_recipe(name, overrides)
    check_fit(recipe, settings, kind, cluster)
    return with_absolute_paths(recipe)


def check_fit(
    recipe: Recipe,
    settings: Settings,
    kind: ClusterKind,
    cluster: Cluster,
    awaited: Mapping[str, Recipe] | None = None,
    begun: bool = False,
) -> None:
    """Raises UserError where a recipe cannot be trained by the cluster's workers, or on their devices. awaited, begun:
    as `check` takes them."""
    check(recipe, cluster.nodes * cluster.workers, settings, awaited=awaited, begun=begun)
    device = recipe.run.device
    if (device == "cpu" and cluster.gpus_per_node) or (
        device == "cuda" and not cluster.gpus_per_node and kind == "slurm"
    ):
        raise UserError(
            f"{settings.where(('run', 'device'))}: run.device is {device}, but gpus_per_node is "
            f"{cluster.gpus_per_node}; change one of them"
        )


def check_submittable(kind: ClusterKind, top: Path) -> None:
    """Raises UserError where no job can be submitted. It is called before anything is created."""
    code_snapshot.check_path(top)
    if kind == "slurm" and shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here; submit where SLURM is, or try it on this machine: --cluster local")
    if kind == "slurm" and (names := left_out_options()):
        tell(
            f"kilobatch: {', '.join(names)}: not handed on, as it would replace what the job's script says; options of "
            "sbatch stand in cluster.yaml or on the command line (kilobatch submit --help)"
        )


def unknown_submission(top: Path, folders: Sequence[Path], error: NoAnswer) -> NoAnswer:
    """The message for a submission, of a run or of a sweep's runs, of which SLURM does not tell whether it worked."""
    others = ", and likewise of its other runs," if len(folders) > 1 else ""
    return NoAnswer(
        f"it is not known whether the job of {top} is queued: {error}; if it comes, it trains there; once SLURM "
        f"answers, kilobatch resume {folders[0]}{others} looks for it, and queues it where there is none"
    )


def compare_with_beginning(folder: Path, recipe: Recipe, continuation: Continuation) -> Callable[[], None]:
    """Returns what writes the changes that are meant. Raises UserError where a run's recipe has changed otherwise since
    it began. Its data, which may take long to convert, are compared by the job; or here, where changes are recorded."""
    data = prepare_data(recipe) if continuation.records else None
    return partial(continuation.write, folder, recipe, data, continuation.compare(folder, recipe, data))


def _create_runs(top: Path, names: list[str], recipes: list[Recipe], recipe_name: str, cluster: Cluster) -> list[Path]:
    """Creates the run's folder `top` or, for a sweep, a folder in it for each point. Returns them."""
    workers = cluster.nodes * cluster.workers
    if not names:
        options = recipes[0].run.model_copy(update={"name": top.name})
        return [run_folder.create_run(options, recipe_name, recipes[0].dump_yaml(), workers)]
    return [
        run_folder.create_run(
            recipe.run.model_copy(update={"folder": str(top), "name": name}), recipe_name, recipe.dump_yaml(), workers
        )
        for name, recipe in zip(names, recipes, strict=True)
    ]


def queue_runs(
    kind: ClusterKind,
    cluster: Cluster,
    top: Path,
    folders: list[Path],
    code: Path,
    *,
    chained: bool = False,
    after: str | None = None,
    anyway: bool = False,
) -> list[str]:
    """Submits runs to the scheduler. Writes their job.json, and the job's id into it as soon as there is one.

    top: the folder of the run, sweep or pipeline; code: the snapshot that the jobs run; chained: each run waits until
    the one before it has finished, and the first one waits for the job `after`; anyway: as `submit` takes it. Returns
    the jobs' ids. Raises UserError where the scheduler refuses; where it does not answer, runs that were not submitted
    are left as they were.
    """
    before = {folder: FormerRecords(folder) for folder in folders}
    files = [_job_file(kind, cluster, top, folder, code, anyway) for folder in folders]
    for k, (folder, file) in enumerate(zip(folders, files, strict=True)):
        (folder / "cancelled").unlink(missing_ok=True)
        if chained:
            files[k] = file.model_copy(update={"sweep": None})
        elif len(folders) > 1:
            files[k] = file.model_copy(update={"array_index": k})
        write_whole(folder / "cluster.yaml", [cluster.dump_yaml().encode()])
        job_history.write_job_file(folder, files[k])
        run_folder.set_status(folder, "queued", cluster.nodes * cluster.workers)
    if kind == "slurm" and chained:
        submitted = sbatch.chain(cluster, top.name, code, folders, after)
    elif kind == "slurm":
        submitted = iter(sbatch.submit_array(cluster, top.name, top / "submitit", code, folders))
    else:
        submitted = iter(local_queue.start(folders, code))
    ids: list[str] = []
    try:
        for folder, file in zip(folders, files, strict=True):
            ids.append(next(submitted))
            job_history.write_job_file(folder, file.model_copy(update={"job_id": ids[-1]}))
    except NoAnswer:
        for folder in folders[len(ids) + 1 :] if chained else ():
            before[folder].put_back()
        raise
    return ids


def _job_file(kind: ClusterKind, cluster: Cluster, top: Path, folder: Path, code: Path, anyway: bool) -> JobFile:
    previous = job_history.read_job_file(folder)
    return JobFile(
        cluster=kind,
        job_id="",
        nodes=cluster.nodes,
        workers_per_node=cluster.workers,
        sweep=top.name if folder != top else previous.sweep if previous else None,
        submitted=job_history.utc_now(),
        code=os.path.relpath(code, folder),
        interface=cluster.interface,
        signal_lead_seconds=lead_seconds(kind, cluster),
        time_minutes=cluster.minutes,
        anyway=anyway,
        earlier=[*previous.earlier, *filter(None, [previous.job_id])] if previous else [],
    )


def _dry_run_text(kind: ClusterKind, cluster: Cluster, top: Path, names: list[str]) -> str:
    code = top / "code" / "001"
    if kind == "slurm":
        return sbatch.script(cluster, top.name, top / "submitit", code, len(names) or 1)
    return local_queue.command([top / name for name in names] or [top], code) + "\n"


def print_submission(top: Path, ids: list[str], cluster: Cluster) -> None:
    """Prints where the runs are, their jobs and the commands that come next."""
    size = f"{_count(cluster.nodes, 'node')} × {_count(cluster.workers, 'worker')}"
    if len(ids) == 1:
        say(f"run: {top}\njob: {ids[0]} ({size})")
    else:
        say(f"sweep: {top}, {len(ids)} runs\njobs: {ids[0]} to {ids[-1]} (each {size})")
    say(f"kilobatch status, kilobatch logs {top}, kilobatch cancel {top}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
