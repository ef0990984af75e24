"""`kilobatch resume` and `kilobatch cancel`. Loads no torch, but where a run is resumed on this machine."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from kilobatch.data.errors import UserError
from kilobatch.data.files import write_whole
from kilobatch.launch.cli.pipeline import resume_pipeline
from kilobatch.launch.jobs import code_snapshot, submit
from kilobatch.launch.jobs.cluster import Cluster, ClusterKind, choose_cluster, cluster_again, names_cluster
from kilobatch.launch.jobs.lost_submission import known_job
from kilobatch.launch.pipelines.pipeline import find_pipeline, reason_to_wait, stages_around
from kilobatch.launch.processes.output import say, tell
from kilobatch.launch.recipes.continuation import Continuation, refuse_finished, refuse_missing_data
from kilobatch.launch.recipes.references import begun
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.earlier_checkpoint import check_checkpoint
from kilobatch.launch.runs.former_records import FormerRecords, put_back_if_refused
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.launch.schedulers.scheduler import NoAnswer
from kilobatch.launch.schedulers.select import scheduler_of


def resume(
    run: str,
    workers: int | None,
    cluster_name: str | None,
    resources: dict[str, Any],
    continuation: Continuation,
    from_step: int | None = None,
    anyway: bool = False,
) -> int:
    """Continues a run from its newest complete checkpoint, or a pipeline. Returns the exit code.

    The run becomes a job where it was one or a cluster is named, with its former resources except for those that are
    given; else, or where `workers` is given, it runs on this machine. continuation: the changes that are meant;
    from_step: of the checkpoint to go on from; the newer ones are set aside. Raises UserError where the run has
    finished, unless it gets more epochs, or is still queued or running, and where its data or recipe have changed
    otherwise; where it cannot fit into memory, unless `anyway` is given.
    """
    if (top := find_pipeline(run)) is not None:
        if from_step is not None:
            raise UserError(f"--from {from_step} is for one run; name a stage of {top}, such as {top / 'pretrain'}")
        return resume_pipeline(top, workers, cluster_name, resources, continuation, anyway)
    folder = run_folder.find_run(run)
    submitted = known_job(folder)
    if submitted and submitted.original:
        tell(f"kilobatch: {folder} is {submitted.original}; it goes on as a run of its own")
    on_cluster = names_cluster(workers, cluster_name, resources, "goes on")
    _check_resumable(folder, submitted, continuation)
    if from_step is not None:
        check_checkpoint(folder, from_step)
    if workers is None and (submitted or on_cluster):
        _resubmit(folder, submitted, cluster_name, resources, continuation, from_step, anyway)
        return 0
    from kilobatch.launch.cli import train

    return train.resume(run, workers, continuation, from_step, anyway)


def _check_resumable(folder: Path, submitted: JobFile | None, continuation: Continuation) -> None:
    """Raises UserError for a run that has finished, is queued or running as a job, or waits for another stage; and for
    more epochs of a stage from which the next one has begun."""
    status = run_folder.status(folder)
    if status == "finished":
        refuse_finished(folder, continuation.read(folder)[0])
        if later := next(filter(begun, stages_around(folder)[1]), None):
            raise UserError(
                f"{folder} has finished, and {later} has begun with its weights, which more epochs would replace; to "
                f"train on in a run of its own: kilobatch branch {folder} NEW"
            )
    if submitted and submitted.job_id and status in ("queued", "running"):
        raise UserError(f"{folder} is {status} as job {submitted.job_id}; kilobatch cancel {folder} ends it")
    if (reason := reason_to_wait(folder)) is not None:
        raise UserError(reason)


def _resubmit(
    folder: Path,
    submitted: JobFile | None,
    cluster_name: str | None,
    resources: dict[str, Any],
    continuation: Continuation,
    from_step: int | None,
    anyway: bool,
) -> None:
    if submitted and cluster_name is None:
        kind = submitted.cluster
        cluster = cluster_again(kind, folder / "cluster.yaml", resources)
    else:
        kind, cluster = choose_cluster(cluster_name, resources)
    recipe, settings = continuation.read(folder)
    refuse_missing_data(folder, recipe, settings, "resume")
    submit.check_fit(recipe, settings, kind, cluster, begun=begun(folder))
    submit.check_submittable(kind, folder)
    write_changes = submit.compare_with_beginning(folder, recipe, continuation)
    # Until the job is queued, so that no other command queues or trains the run meanwhile. A job that begins waits.
    with run_folder.locked(folder):
        if (now := job_history.read_job_file(folder)) != submitted:
            raise UserError(f"{folder} was submitted by another command{f', as job {now.job_id}' if now else ''}")
        ids = _queue(folder, kind, cluster, write_changes, from_step, anyway)
    submit.print_submission(folder, ids, cluster)


def _queue(
    folder: Path,
    kind: ClusterKind,
    cluster: Cluster,
    write_changes: Callable[[], None],
    from_step: int | None,
    anyway: bool,
) -> list[str]:
    """Queues the run, which is locked, with its changes and today's code. Returns the job's id. Where the scheduler
    refuses it, all is as before."""
    with put_back_if_refused(former := FormerRecords(folder)):
        if from_step is not None and (aside := former.set_newer_aside(from_step)) is not None:
            tell(f"kilobatch: the newer checkpoints are now in {aside}")
        write_changes()  # they count from the newest checkpoint that is left
        code = code_snapshot.take_snapshot(folder / "code")
        try:
            return submit.queue_runs(kind, cluster, folder, [folder], code, anyway=anyway)
        except NoAnswer as error:  # the job may come, and needs what was written
            raise submit.unknown_submission(folder, [folder], error) from error
        except (UserError, OSError):
            shutil.rmtree(code)
            raise


def cancel(names: list[str]) -> None:
    """Cancels the jobs of runs, queued or running, for good. The name of a sweep or pipeline stands for all its runs.

    A running job saves first, and `kilobatch resume` goes on from there. Raises UserError for a run that is not a job.
    """
    folders = [folder for name in names for folder in _runs_of(name)]
    files = [_job_of(folder) for folder in folders]
    by_kind: dict[Literal["slurm", "local"], list[tuple[Path, JobFile]]] = {}
    for folder, file in zip(folders, files, strict=True):
        if file.job_id:
            by_kind.setdefault(file.cluster, []).append((folder, file))
        else:
            _cancel_without_job(folder, file)
    for kind, jobs in by_kind.items():
        scheduler = scheduler_of(kind)
        states = scheduler.states([file.job_id for _, file in jobs])
        open_jobs = [(folder, file) for folder, file in jobs if states[file.job_id].open]
        for folder, _ in open_jobs:  # a job that is asked to stop looks for this file, and then does not requeue itself
            write_whole(folder / "cancelled", [job_history.utc_now().encode()])
        try:
            scheduler.cancel([file.job_id for _, file in open_jobs])
        except NoAnswer:  # it may have worked
            raise
        except UserError:  # a job that goes on is to be queued anew, as before
            for folder, _ in open_jobs:
                (folder / "cancelled").unlink(missing_ok=True)
            raise
        for folder, file in jobs:
            state = states[file.job_id]
            if state.state == "queued":  # no job has begun that could write it
                run_folder.set_status(folder, "cancelled", file.nodes * file.workers_per_node)
            result = "cancelled" if state.open else f"was over already ({run_folder.status(folder, state)})"
            say(f"{folder}: job {file.job_id} {result}")


def _cancel_without_job(folder: Path, file: JobFile) -> None:
    """Cancels a run that waits for a job which is not in the queue: where it comes late, it does not begin."""
    if run_folder.read_state(folder).status == "queued":
        write_whole(folder / "cancelled", [job_history.utc_now().encode()])
        run_folder.set_status(folder, "cancelled", file.nodes * file.workers_per_node)
        say(f"{folder}: its job is not in the queue; cancelled, so that it does not begin if it comes")
    else:
        say(f"{folder}: has no job{_describe_process(folder)}")


def _runs_of(name: str) -> list[Path]:
    """The folders of a run, of the points of a sweep, or of the stages of a pipeline."""
    for folder in run_folder.candidate_paths(name):
        points = sorted(folder.glob("*/job.json")) or sorted(folder.glob("*/recipe.yaml"))
        if not (folder / "recipe.yaml").exists() and points:
            return [point.parent for point in points]
    return [run_folder.find_run(name)]


def _job_of(folder: Path) -> JobFile:
    file = known_job(folder)
    if file is None:
        raise UserError(f"{folder} was not submitted, so there is no job to cancel{_describe_process(folder)}")
    if file.original:
        there = Path(file.original.folder).exists()
        way_out = f"kilobatch cancel {file.original.folder}" if there else f"scancel {file.original.job_id}"
        raise UserError(
            f"{folder} is {file.original}, so there is nothing to cancel; {way_out} ends that job, and kilobatch "
            f"resume {folder} makes the copy a run of its own"
        )
    return file


def _describe_process(folder: Path) -> str:
    """Where a run is trained without a job, as a clause; "" where it is not."""
    state = run_folder.read_state(folder)
    return f"; it runs here, as process {state.pid} on {state.host}" if run_folder.status(folder) == "running" else ""
