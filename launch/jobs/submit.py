"""`kilobatch submit`: a recipe, or the points of a sweep, checked, put into run folders with the code, and queued.
Loads no torch."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kilobatch.data.errors import Refusal
from kilobatch.data.files import discard, write_whole
from kilobatch.launch.jobs import cluster, sbatch
from kilobatch.launch.jobs import code_snapshot as snapshot
from kilobatch.launch.jobs import local_queue as local
from kilobatch.launch.jobs.cluster import KIND, Cluster, lead_seconds
from kilobatch.launch.recipes import recipe, sweep
from kilobatch.launch.recipes.checks import check
from kilobatch.launch.recipes.data import with_absolute_paths
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.recipes.settings import Settings
from kilobatch.launch.runs import job_history as ledger
from kilobatch.launch.runs import run_folder as runs
from kilobatch.launch.runs.job_history import JobFile


def submit(
    name: str,
    overrides: list[str],
    sweeps: list[str],
    run_name: str | None,
    given: str | None,
    resources: dict[str, Any],
    dry_run: bool,
) -> list[Path]:
    """Queues a job for a recipe, or an array of jobs for a sweep of it.

    given, resources: as cluster.choose takes them; dry_run: prints what would be handed to the scheduler, and makes
    nothing. Returns the runs' folders. Raises Refusal before anything is made; where the scheduler refuses, what was
    made is removed.
    """
    kind, asked = cluster.choose(given, resources)
    if run_name is not None:
        overrides = [*overrides, f"run.name={json.dumps(run_name)}"]
    points = sweep.points(sweeps)
    recipes = [_read(name, [*overrides, *point.changes], kind, asked) for point in points]
    top = runs.place(recipes[0].run, Path(name).stem)
    names = [point.name for point in points] if sweeps else []
    if dry_run:
        print(_dry(kind, asked, top, names), end="")
        return []
    refuse_unqueued(kind, top)
    folders = _folders(top, names, recipes, Path(name).stem, asked)
    try:
        ids = queue(kind, asked, top, folders, snapshot.take(top / "code"))
    except Refusal:
        discard(top)
        raise
    tell(top, ids, asked)
    return folders


def _read(name: str, changes: list[str], kind: KIND, asked: Cluster) -> Recipe:
    """The recipe, checked against what is asked for, its data named by absolute paths: a job, and whoever resumes it,
    may stand in another folder."""
    chosen, settings = recipe.read(name, changes)
    check_fit(chosen, settings, kind, asked)
    return with_absolute_paths(chosen)


def check_fit(
    chosen: Recipe,
    settings: Settings,
    kind: KIND,
    asked: Cluster,
    awaited: Mapping[str, Recipe] | None = None,
    begun: bool = False,
) -> None:
    """Raises Refusal where a recipe cannot be trained by so many workers, or on what they get. awaited, begun: as of
    check."""
    check(chosen, asked.nodes * asked.workers, settings, awaited=awaited, begun=begun)
    device = chosen.run.device
    if (device == "cpu" and asked.gpus_per_node) or (device == "cuda" and not asked.gpus_per_node and kind == "slurm"):
        raise Refusal(
            f"{settings.where(('run', 'device'))}: run.device is {device}, but gpus_per_node is {asked.gpus_per_node}; "
            "change one of them"
        )


def refuse_unqueued(kind: KIND, top: Path) -> None:
    """Raises Refusal where no job can come of it, so that nothing is made for one."""
    snapshot.refuse_odd(top)
    if kind == "slurm" and shutil.which("sbatch") is None:
        raise Refusal("there is no sbatch here; submit where SLURM is, or try it on this machine: --cluster local")


def _folders(top: Path, names: list[str], recipes: list[Recipe], recipe_name: str, asked: Cluster) -> list[Path]:
    """The run's folder, or those of the sweep's points within the sweep's."""
    workers = asked.nodes * asked.workers
    if not names:
        options = recipes[0].run.model_copy(update={"name": top.name})
        return [runs.create(options, recipe_name, recipes[0].dump_yaml(), workers)]
    return [
        runs.create(
            chosen.run.model_copy(update={"folder": str(top), "name": name}), recipe_name, chosen.dump_yaml(), workers
        )
        for name, chosen in zip(names, recipes, strict=True)
    ]


def queue(
    kind: KIND,
    asked: Cluster,
    top: Path,
    folders: list[Path],
    code: Path,
    *,
    chained: bool = False,
    after: str | None = None,
) -> list[str]:
    """Hands runs to the scheduler and writes their job.json, which names the job as soon as it has an id.

    top: the run's folder, or the sweep's or pipeline's; code: the snapshot that the jobs are to run; chained: each run
    waits for the one before it to finish, the first for the job `after`. Returns the jobs' ids. Raises Refusal where
    the scheduler refuses.
    """
    files = [_job_file(kind, asked, top, folder, code) for folder in folders]
    for k, (folder, file) in enumerate(zip(folders, files, strict=True)):
        (folder / "cancelled").unlink(missing_ok=True)
        if chained:
            files[k] = file.model_copy(update={"sweep": None})
        elif len(folders) > 1:
            files[k] = file.model_copy(update={"array_index": k})
        write_whole(folder / "cluster.yaml", [asked.dump_yaml().encode()])
        ledger.write_job_file(folder, files[k])
        runs.set_status(folder, "queued", asked.nodes * asked.workers)
    if kind == "slurm" and chained:
        ids = sbatch.chain(asked, top.name, code, folders, after)
    elif kind == "slurm":
        ids = sbatch.queue(asked, top.name, top / "submitit", code, folders)
    else:
        ids = local.start(folders, code)
    for folder, file, job_id in zip(folders, files, ids, strict=True):
        ledger.write_job_file(folder, file.model_copy(update={"job_id": job_id}))
    return ids


def _job_file(kind: KIND, asked: Cluster, top: Path, folder: Path, code: Path) -> JobFile:
    before = ledger.job_file(folder)
    return JobFile(
        cluster=kind,
        job_id="",
        nodes=asked.nodes,
        workers_per_node=asked.workers,
        sweep=top.name if folder != top else before.sweep if before else None,
        submitted=ledger.now(),
        code=os.path.relpath(code, folder),
        interface=asked.interface,
        signal_lead_seconds=lead_seconds(kind, asked),
        time_minutes=asked.minutes,
        earlier=[*before.earlier, before.job_id] if before else [],
    )


def _dry(kind: KIND, asked: Cluster, top: Path, names: list[str]) -> str:
    code = top / "code" / "001"
    if kind == "slurm":
        return sbatch.script(asked, top.name, top / "submitit", code, len(names) or 1)
    return local.command([top / name for name in names] or [top], code) + "\n"


def tell(top: Path, ids: list[str], asked: Cluster) -> None:
    each = f"{_several(asked.nodes, 'node')} × {_several(asked.workers, 'worker')}"
    if len(ids) == 1:
        print(f"run: {top}\njob: {ids[0]} ({each})")
    else:
        print(f"sweep: {top}, {len(ids)} runs\njobs: {ids[0]} to {ids[-1]} (each {each})")
    print(f"kilobatch status, kilobatch logs {top}, kilobatch cancel {top}", flush=True)


def _several(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
