"""Starts the workers of a job on one of its nodes."""

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from kilobatch.data.errors import UserError
from kilobatch.data.files import is_full_disk, refusal_of
from kilobatch.launch.processes.exit_status import RunOutcome, this_host
from kilobatch.launch.processes.supervisor import MemoryQuestion
from kilobatch.launch.processes.victims import LAST_LINES
from kilobatch.launch.recipes.recipe import Recipe, load_recipe
from kilobatch.launch.runs import job_history
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.launch.schedulers.scheduler import Task


def read_job(folder: Path) -> tuple[Recipe, JobFile]:
    """The recipe and the job of a run. Raises UserError where it was not submitted."""
    job = job_history.read_job_file(folder)
    if job is None:
        raise UserError(f"{folder / 'job.json'} is missing; submit the run with: kilobatch resume {folder}")
    return load_recipe(folder / "recipe.yaml")[0], job


def workers_per_node(task: Task, job: JobFile) -> int:
    """Workers on each node. A local job has one node, which then runs the workers of all nodes that were asked for."""
    return job.workers_per_node * job.nodes // task.nodes


def meeting_name(task: Task, start: int = 0) -> str:
    """The name under which the agents of one start of the workers find each other."""
    return f"{task.job}-{task.restart}" + (f"-{start}" if start else "")


def run_node_workers(
    folder: Path,
    task: Task,
    workers: int,
    recipe: Recipe,
    job: JobFile,
    stop_requested: Callable[[], str | None],
    prepare: Callable[[], list[str]],
    meeting: str,
    arguments: Sequence[str] = (),
    question: MemoryQuestion | None = None,
) -> RunOutcome:
    """Runs this node's `workers`, with these arguments after the run's folder, until those of all nodes have ended; the
    others as agent.run_node has them."""
    from kilobatch.launch.nodes import agent

    return agent.run_node(
        folder,
        task.node,
        task.nodes,
        workers,
        meeting,
        [str(folder), *arguments],
        interface=job.interface,
        stop_requested=stop_requested,
        stall_minutes=recipe.run.stall_minutes,
        prepare=prepare,
        question=question,
    )


def own_failure(error: Exception) -> RunOutcome:
    """The outcome where this process itself has failed: a refusal on a full disk, which a requeue would not mend."""
    if isinstance(error, OSError) and is_full_disk(error):
        return RunOutcome("refused", None, this_host(), lines=[f"kilobatch: {refusal_of(error)}"])
    lines = traceback.format_exc().splitlines()[-LAST_LINES:]
    return RunOutcome("failed", None, this_host(), f"the launcher failed: {error!r}", lines)
