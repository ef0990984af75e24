"""Commands that train, continue, queue and follow runs.

What a command needs is imported when it is called, so that `kilobatch --help` and a wrong option are answered at once.
"""

from typing import Any

import typer

from kilobatch.launch.cli.commands import run_options
from kilobatch.launch.cli.commands.options import (
    Anyway,
    ClusterName,
    DataRoot,
    DryRun,
    Json,
    Name,
    NewRunWorkers,
    Overrides,
    Recipe,
    Run,
    Workers,
)
from kilobatch.launch.cli.commands.resource_options import with_resources


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    name: Name = None,
    workers: NewRunWorkers = None,
    dry_run: DryRun = False,
    anyway: Anyway = False,
) -> None:
    """Trains a recipe on this machine, in a new run folder."""
    from kilobatch.launch.cli.train import train

    raise typer.Exit(train(recipe, overrides or [], workers, anyway, name, dry_run))


@with_resources
def submit(
    recipe: Recipe,
    overrides: Overrides = None,
    sweep: run_options.Sweep = None,
    name: Name = None,
    cluster: ClusterName = None,
    dry_run: DryRun = False,
    anyway: Anyway = False,
    **resources: Any,
) -> None:
    """Trains a recipe as a job of a cluster. When it is preempted or at its time limit, it is queued again."""
    from kilobatch.launch.jobs.submit import submit

    submit(recipe, overrides or [], sweep or [], name, cluster, resources, dry_run, anyway)


@with_resources
def pipeline(
    recipe: Recipe,
    overrides: run_options.StageOverrides = None,
    labels: run_options.Labels = None,
    pretrained: run_options.Pretrained = None,
    teacher: run_options.Teacher = None,
    self_distill: run_options.SelfDistill = False,
    scratch: run_options.Scratch = False,
    name: Name = None,
    workers: NewRunWorkers = None,
    cluster: ClusterName = None,
    dry_run: DryRun = False,
    anyway: Anyway = False,
    **resources: Any,
) -> None:
    """Pre-trains, fine-tunes on few labels and distils in three runs, on this machine or as jobs of a cluster."""
    from kilobatch.launch.cli.pipeline import start_pipeline
    from kilobatch.launch.pipelines.stages import PipelineRequest

    request = PipelineRequest(recipe, overrides or [], labels, pretrained, self_distill, scratch, teacher)
    raise typer.Exit(start_pipeline(request, name, workers, cluster, resources, dry_run, anyway))


@with_resources
def resume(
    run: Run,
    overrides: Overrides = None,
    from_step: run_options.FromStep = None,
    accept_changes: run_options.AcceptChanges = False,
    data_root: DataRoot = None,
    anyway: Anyway = False,
    workers: Workers = None,
    cluster: ClusterName = None,
    **resources: Any,
) -> None:
    """Continues a run from its newest checkpoint, or a pipeline: as a job if it was one, else on this machine.

    Changes to the recipe count from there on: more schedule.epochs train a finished run on, fewer than are done end it.
    """
    from kilobatch.launch.cli.resume import resume
    from kilobatch.launch.recipes.continuation import Continuation

    continuation = Continuation(tuple(overrides or ()), tuple(data_root or ()), accept_changes)
    raise typer.Exit(resume(run, workers, cluster, resources, continuation, from_step, anyway))


def branch(
    run: Run,
    new: run_options.NewRun,
    overrides: Overrides = None,
    from_step: run_options.BranchStep = None,
    data_root: DataRoot = None,
) -> None:
    """Makes a new run that goes on from a checkpoint of another, with changes or without. kilobatch resume trains it.

    The other run stays as it is.
    """
    from kilobatch.launch.cli.branch import branch
    from kilobatch.launch.recipes.continuation import Continuation

    branch(run, new, from_step, Continuation(tuple(overrides or ()), tuple(data_root or ())))


def cancel(runs: run_options.JobRuns) -> None:
    """Cancels the jobs of runs, queued or running, for good. A running job saves a checkpoint first."""
    from kilobatch.launch.cli.resume import cancel

    cancel(runs)


def status(
    runs: run_options.ListedRuns = None,
    best_first: run_options.BestFirst = False,
    everything: run_options.AllRuns = False,
    watch: run_options.Watch = False,
    as_json: Json = False,
) -> None:
    """Shows how far runs are, where their jobs run, and why they ended."""
    from kilobatch.launch.cli.reports.status import status

    status(runs or [], best_first=best_first, everything=everything, watch=watch, as_json=as_json)


def logs(
    run: Run, follow: run_options.Follow = False, rank: run_options.Rank = None, lines: run_options.Lines = None
) -> None:
    """Prints what all ranks of a run wrote, merged by time (UTC)."""
    from kilobatch.launch.cli.reports.logs import logs

    logs(run, follow=follow, rank=rank, lines=lines)


@with_resources
def drill(recipe: Recipe, overrides: Overrides = None, cluster: ClusterName = None, **resources: Any) -> None:
    """Tests a cluster: trains a recipe twice, stops and kills one of the runs, and reports what that cost."""
    from kilobatch.launch.cli.drill import drill

    raise typer.Exit(0 if drill(recipe, overrides or [], cluster, resources) else 1)
