"""The commands of `kilobatch`, each handed on to launch/cli/ or launch/jobs/.

What a command needs is imported when it is called, so that `kilobatch --help` and a wrong option are answered at once.
"""

import json
import sys
from typing import Any

import typer

from kilobatch.data.errors import UserError
from kilobatch.data.files import is_full_disk, refusal_of
from kilobatch.launch.cli import options
from kilobatch.launch.cli.options import ClusterName, DryRun, NewRunWorkers, Overrides, Recipe, Run, Workers
from kilobatch.launch.cli.resource_options import with_resources
from kilobatch.launch.processes.output import tell
from kilobatch.launch.processes.standard_streams import flush_stdout, prepare_streams

app = typer.Typer(
    name="kilobatch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Trains contrastive image encoders with batches of thousands of images, on one machine or as SLURM jobs. The "
    "number of workers does not change the result, and a killed run goes on from its last checkpoint.",
)


@app.command()
def recipes(print_schema: options.Schema = False) -> None:
    """Lists the recipes and what each of them reproduces."""
    if print_schema:
        from kilobatch.launch.recipes.recipe import schema

        print(json.dumps(schema(), indent=2))
        return
    from kilobatch.launch.cli.tables import print_recipes

    print_recipes()


@app.command()
def train(recipe: Recipe, overrides: Overrides = None, workers: NewRunWorkers = None) -> None:
    """Trains a recipe on this machine, in a new run folder."""
    from kilobatch.launch.cli.train import train

    raise typer.Exit(train(recipe, overrides or [], workers))


@app.command()
@with_resources
def submit(
    recipe: Recipe,
    overrides: Overrides = None,
    sweep: options.Sweep = None,
    name: options.Name = None,
    cluster: ClusterName = None,
    dry_run: DryRun = False,
    **resources: Any,
) -> None:
    """Trains a recipe as a job of a cluster. When it is preempted or at its time limit, it is queued again."""
    from kilobatch.launch.jobs.submit import submit

    submit(recipe, overrides or [], sweep or [], name, cluster, resources, dry_run)


@app.command()
@with_resources
def pipeline(
    recipe: Recipe,
    overrides: options.StageOverrides = None,
    labels: options.Labels = None,
    pretrained: options.Pretrained = None,
    self_distill: options.SelfDistill = False,
    name: options.Name = None,
    workers: Workers = None,
    cluster: ClusterName = None,
    dry_run: DryRun = False,
    **resources: Any,
) -> None:
    """Pre-trains, fine-tunes on few labels and distils in three runs, on this machine or as jobs of a cluster."""
    from kilobatch.launch.cli.pipeline import start_pipeline
    from kilobatch.launch.pipelines.stages import PipelineRequest

    request = PipelineRequest(recipe, overrides or [], labels, pretrained, self_distill)
    raise typer.Exit(start_pipeline(request, name, workers, cluster, resources, dry_run))


@app.command()
@with_resources
def resume(
    run: Run,
    from_step: options.FromStep = None,
    accept_changes: options.AcceptChanges = False,
    workers: Workers = None,
    cluster: ClusterName = None,
    **resources: Any,
) -> None:
    """Continues a run from its newest checkpoint, or a pipeline: as a job if it was one, else on this machine."""
    from kilobatch.launch.cli.resume import resume

    raise typer.Exit(resume(run, workers, cluster, resources, accept_changes, from_step))


@app.command()
def cancel(runs: options.JobRuns) -> None:
    """Cancels the jobs of runs, queued or running, for good. A running job saves a checkpoint first."""
    from kilobatch.launch.cli.resume import cancel

    cancel(runs)


@app.command()
def status(
    runs: options.ListedRuns = None,
    sweep: options.ListedSweep = None,
    everything: options.AllRuns = False,
    watch: options.Watch = False,
    as_json: options.Json = False,
) -> None:
    """Shows how far runs are, where their jobs run, and why they ended."""
    from kilobatch.launch.cli.status import status

    status(runs or [], sweep, everything=everything, watch=watch, as_json=as_json)


@app.command()
def logs(run: Run, follow: options.Follow = False, rank: options.Rank = None, lines: options.Lines = None) -> None:
    """Prints what all ranks of a run wrote, merged by time (UTC)."""
    from kilobatch.launch.cli.logs import logs

    logs(run, follow=follow, rank=rank, lines=lines)


@app.command()
@with_resources
def drill(recipe: Recipe, overrides: Overrides = None, cluster: ClusterName = None, **resources: Any) -> None:
    """Tests a cluster: trains a recipe twice, stops and kills one of the runs, and reports what that cost."""
    from kilobatch.launch.cli.drill import drill

    raise typer.Exit(0 if drill(recipe, overrides or [], cluster, resources) else 1)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpu: options.Gpu = "cpu",
    nodes: options.Nodes = 1,
    gpus_per_node: options.GpusPerNode = 1,
    images: options.Images = None,
    classes: options.Classes = 1000,
    cores: options.Cores = None,
    memory: options.Memory = None,
    measured: options.Measured = None,
    as_json: options.Json = False,
) -> None:
    """Predicts memory, traffic and time of a run without its machines. Says so if the run cannot fit."""
    from kilobatch.launch.cli.plan import plan

    plan(
        recipe,
        overrides or [],
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        images=images,
        classes=classes,
        cores=cores,
        memory_gib=memory,
        measured=measured,
        as_json=as_json,
    )


@app.command()
def bench(
    device: options.BenchDevice = "auto", ranks: options.BenchRanks = None, file: options.BenchFile = None
) -> None:
    """Measures loader, loss, training step and collectives on this machine, and compares each with its limit."""
    from kilobatch.launch.cli.bench import bench

    bench(device, ranks, file)


@app.command("eval")
def evaluate(
    run: Run,
    overrides: options.EvaluateOverrides = None,
    knn: options.Knn = False,
    linear: options.Linear = False,
    fast_linear: options.FastLinear = False,
    classify: options.Classify = False,
    train: options.TrainImages = None,
    test: options.TestImages = None,
    workers: Workers = None,
) -> None:
    """Evaluates the encoder of a run, as it is in the newest checkpoint.

    Without an evaluator it asks again what failed at the end of the training.
    """
    from kilobatch.launch.cli.train import evaluate

    wanted = {"knn": knn, "linear": linear, "fast_linear": fast_linear}
    wanted |= {"classify": classify, "classify_moved": classify}
    images = {"train": train, "test": test}
    raise typer.Exit(evaluate(run, [name for name in wanted if wanted[name]], overrides or [], images, workers))


@app.command()
def convert(
    source: options.Source = None,
    out: options.BetonFile = None,
    max_side: options.MaxSide = None,
    min_side: options.MinSide = None,
    quality: options.Quality = 90,
    value_range: options.ValueRange = None,
    split: options.Split = "train",
    skip_broken: options.SkipBroken = False,
    verify: options.VerifiedFile = None,
    adopt: options.AdoptedFile = None,
    classes: options.ClassNames = None,
    label: options.LabelField = None,
) -> None:
    """Writes images to a .beton file for training, checks such a file, or adopts one that FFCV wrote."""
    from kilobatch.launch.cli.convert import adopt_file, convert, refuse_without_adopt, verify_file

    if adopt is not None and verify is not None:
        raise UserError(f"--adopt checks every byte of a file, as --verify does; leave out --verify {verify}")
    if adopt is None:
        refuse_without_adopt(classes=classes, label=label)
    if adopt is not None:
        adopt_file(adopt, source, out, classes, label)
    elif verify is not None:
        verify_file(verify, source, out)
    else:
        convert(
            source,
            out,
            split=split,
            max_side=max_side,
            min_side=min_side,
            quality=quality,
            value_range=value_range,
            skip_broken=skip_broken,
        )


@app.command()
def export(run: Run, out: options.SafetensorsFile, whole: options.Whole = False, force: options.Force = False) -> None:
    """Writes a run's encoder to a .safetensors file, with torchvision's parameter names."""
    from kilobatch.launch.cli.convert import export

    export(run, out, force=force, whole=whole)


@app.command("import")
def import_checkpoint(
    checkpoint: options.Checkpoint,
    out: options.SafetensorsFile,
    projections: options.Projections = False,
    classifier_after: options.ClassifierAfter = None,
    force: options.Force = False,
) -> None:
    """Converts a checkpoint of SimCLR's authors to a .safetensors file, for runs to start from."""
    from kilobatch.launch.cli.convert import import_tensorflow

    import_tensorflow(checkpoint, out, projections=projections, classifier_after=classifier_after, force=force)


@app.command()
def verify(method: options.MethodName = None, everything: options.AllMethods = False) -> None:
    """Compares a method's gradients with its paper's formula, for several numbers of ranks and chunks."""
    from kilobatch.launch.cli.tables import verify

    raise typer.Exit(0 if verify(method, everything) else 1)


def main(argv: list[str] | None = None) -> None:
    """Runs a command. Exits with 0, 1 (a worker or a check failed), 2 (refused) or 130 (interrupted)."""
    prepare_streams()
    try:
        app(argv)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and not is_full_disk(error):
            raise
        tell(f"kilobatch: {refusal_of(error) if isinstance(error, OSError) else error}")
        sys.exit(2)
    except SystemExit as end:
        flush_stdout()
        if isinstance(end.__context__, BrokenPipeError):  # its reader, such as `head`, has read what it wanted
            sys.exit(0)
        raise


if __name__ == "__main__":
    main()
