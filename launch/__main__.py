"""The commands: `kilobatch --help`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kilobatch.data.errors import Refusal
from kilobatch.launch.cli.resource_options import with_resources

app = typer.Typer(
    name="kilobatch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Trains contrastive image encoders at thousand-image batches: exact on any number of workers, "
    "through any kill.",
)

Run = Annotated[str, typer.Argument(help="A run's folder, or its name under runs/.", show_default=False)]
Workers = Annotated[
    int | None, typer.Option(help="Processes on this machine.  [default: one for each GPU, else 1; a run's own]")
]
Recipe = Annotated[str, typer.Argument(help="A recipe's name, or a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes, such as optimizer.lr=4.8", metavar="[a.b=value]...")
]
ClusterName = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="A YAML file, a name in ~/.config/kilobatch/cluster.yaml, or local: in the background of this machine.",
        show_default=False,
    ),
]


@app.command()
def recipes(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a recipe instead.")] = False,
) -> None:
    """Lists the recipes and what each reproduces."""
    if schema:
        from kilobatch.launch.recipes.recipe import schema as recipe_schema

        print(json.dumps(recipe_schema(), indent=2))
        return
    from kilobatch.launch.cli import tables

    tables.recipes()


@app.command()
def train(recipe: Recipe, overrides: Overrides = None, workers: Workers = None) -> None:
    """Trains a recipe in a new run folder."""
    from kilobatch.launch.cli import train as training

    raise typer.Exit(training.train(recipe, overrides or [], workers))


@app.command()
@with_resources
def submit(
    recipe: Recipe,
    overrides: Overrides = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="A run for each value, KEY=A,B,C; again for every combination.", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the run or the sweep, instead of recipe and time.", show_default=False)
    ] = None,
    cluster: ClusterName = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what sbatch would get; make nothing.")] = False,
    **resources: Any,
) -> None:
    """Trains a recipe as a job of a cluster, through preemptions and time limits."""
    from kilobatch.launch.jobs import submit as submitting

    submitting.submit(recipe, overrides or [], sweep or [], name, cluster, resources, dry_run)


@app.command("pipeline")
@with_resources
def run_pipeline(
    recipe: Recipe,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Changes, to one stage as finetune.schedule.epochs=3, or to all", metavar="[stage.a.b=value]..."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="What fine-tuning may see: 1%, or a file of images' names; else its recipe's.", metavar="1%"),
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="A run or an exported file, in place of the first stage.", show_default=False)
    ] = None,
    self_distill: Annotated[
        bool, typer.Option("--self-distill", help="The student is as large as its teacher.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="Of its folder, instead of recipe and time.", show_default=False)
    ] = None,
    workers: Workers = None,
    cluster: ClusterName = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what sbatch would get; make nothing.")] = False,
    **resources: Any,
) -> None:
    """Pre-trains, fine-tunes on few labels, and distils: a run each, here or, with resources, as dependent jobs."""
    from kilobatch.launch.cli import pipeline as pipeline_runs
    from kilobatch.launch.pipelines.stages import Asked

    asked = Asked(recipe, overrides or [], labels, pretrained, self_distill)
    raise typer.Exit(pipeline_runs.start(asked, name, workers, cluster, resources, dry_run))


@app.command()
@with_resources
def resume(run: Run, workers: Workers = None, cluster: ClusterName = None, **resources: Any) -> None:
    """Goes on with a run from its newest whole checkpoint, or with a pipeline: here, or as a job if it was one."""
    from kilobatch.launch.cli import resume as resubmitting

    raise typer.Exit(resubmitting.resume(run, workers, cluster, resources))


@app.command()
def cancel(
    runs: Annotated[list[str], typer.Argument(help="Runs or sweeps, as folders or names.", show_default=False)],
) -> None:
    """Ends jobs, queued or running, for good; a running one saves first."""
    from kilobatch.launch.cli import resume as resubmitting

    resubmitting.cancel(runs)


@app.command()
def status(
    given: Annotated[
        list[str] | None,
        typer.Argument(help="Runs, sweeps or folders of runs.", metavar="[RUN]...", show_default=False),
    ] = None,
    sweep: Annotated[str | None, typer.Option(help="A sweep's points, best first.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also those that ended over a week ago.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Anew every 10 seconds, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Shows how far runs are, where their jobs are, and what ended them."""
    from kilobatch.launch.cli import status

    status.status(given or [], sweep, everything=everything, watch=watch, as_json=as_json)


@app.command()
def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is over.")] = False,
    rank: Annotated[int | None, typer.Option(help="Of this rank alone.", show_default=False)] = None,
    lines: Annotated[int | None, typer.Option("--lines", "-n", help="The last ones.", show_default=False)] = None,
) -> None:
    """Prints what a run's ranks wrote, merged by time (UTC)."""
    from kilobatch.launch.cli import logs

    logs.logs(run, follow=follow, rank=rank, lines=lines)


@app.command()
@with_resources
def drill(recipe: Recipe, overrides: Overrides = None, cluster: ClusterName = None, **resources: Any) -> None:
    """Tries a cluster out: two jobs, one of them stopped and killed; tells what that cost."""
    from kilobatch.launch.cli import drill

    raise typer.Exit(0 if drill.drill(recipe, overrides or [], cluster, resources) else 1)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpu: Annotated[
        str, typer.Option(help="h100, h200, a100, a100-40, v100, v100-16, l40s, or cpu.", show_default=False)
    ] = "cpu",
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="Workers of each; with cpu, too.")] = 1,
    images: Annotated[
        int | None, typer.Option(help="Training images, where the data are not here.", show_default=False)
    ] = None,
    classes: Annotated[int, typer.Option(help="Classes, for methods that classify.")] = 1000,
    cores: Annotated[
        int | None, typer.Option(help="Processors of each node, for the loader.", show_default=False)
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="GiB of a GPU, if not its data sheet's.", show_default=False)
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="What kilobatch bench --json wrote, for its rates.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Predicts a run's memory, traffic and time on machines that need not be there; refuses what cannot fit."""
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
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="What to measure.")] = "auto",
    ranks: Annotated[
        int | None,
        typer.Option(help="For the collectives.  [default: one for each GPU, else 2; 1: none]", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--json", help="Write it here, too, for kilobatch plan --measured.", show_default=False),
    ] = None,
) -> None:
    """Measures loader, loss, step and collectives on this machine, each beside what limits it."""
    from kilobatch.launch.cli import bench

    bench.bench(device, ranks, file)


@app.command("eval")
def evaluate(
    run: Run,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes, such as evaluate.knn.k=20", metavar="[evaluate.b=value]...")
    ] = None,
    knn: Annotated[bool, typer.Option("--knn", help="Weighted k-NN.")] = False,
    linear: Annotated[bool, typer.Option("--linear", help="Linear probe by the papers' protocol.")] = False,
    fast_linear: Annotated[bool, typer.Option("--fast-linear", help="Linear probe on cached features.")] = False,
    classify: Annotated[
        bool, typer.Option("--classify", help="The run's own classifier, on clean and on moved test images.")
    ] = False,
    test: Annotated[str | None, typer.Option(help="Test images, if not the recipe's.", show_default=False)] = None,
    workers: Workers = None,
) -> None:
    """Evaluates the encoder of a run."""
    from kilobatch.launch.cli import train as training

    asked = {"knn": knn, "linear": linear, "fast_linear": fast_linear}
    asked |= {"classify": classify, "classify_moved": classify}
    evaluators = [name for name, wanted in asked.items() if wanted]
    raise typer.Exit(training.evaluate(run, evaluators, overrides or [], test, workers))


@app.command()
def convert(
    source: Annotated[str | None, typer.Argument(help="folder:PATH, cifar10:PATH, npz:PATH, digits, …")] = None,
    out: Annotated[Path | None, typer.Argument(help="The .beton file to write.")] = None,
    max_side: Annotated[int | None, typer.Option(help="Shrink larger images to this many pixels.")] = None,
    quality: Annotated[int, typer.Option(help="Of JPEGs, 1 to 100.")] = 90,
    split: Annotated[Literal["train", "test"], typer.Option(help="Of sources that have two.")] = "train",
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave unreadable images out.")] = False,
    verify: Annotated[
        Path | None, typer.Option("--verify", help="Check this .beton instead, every byte.", show_default=False)
    ] = None,
) -> None:
    """Writes images as a .beton file for training, or checks one."""
    from kilobatch.launch.cli import convert as converting

    if verify is not None:
        converting.verify(verify, source, out)
    else:
        converting.convert(source, out, split=split, max_side=max_side, quality=quality, skip_broken=skip_broken)


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.", show_default=False)],
    whole: Annotated[
        bool, typer.Option("--whole", help="All of the method, for other runs to start from or to learn from.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Writes a run's encoder as safetensors, with torchvision's names."""
    from kilobatch.launch.cli import convert as converting

    converting.export(run, out, force=force, whole=whole)


@app.command("import")
def import_checkpoint(
    checkpoint: Annotated[
        Path, typer.Argument(help="A TensorFlow checkpoint: its name, a file of it, its folder.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.", show_default=False)],
    projections: Annotated[
        bool, typer.Option("--projections", help="Take the projection head, where there is a classifier too.")
    ] = False,
    classifier_after: Annotated[
        int | None,
        typer.Option(help="Take the classifier, which stands on so many layers of the head.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Writes a checkpoint of SimCLR's authors as safetensors, for runs to start from."""
    from kilobatch.launch.cli import convert as converting

    converting.import_tensorflow(
        checkpoint, out, projections=projections, classifier_after=classifier_after, force=force
    )


@app.command()
def verify(
    method: Annotated[
        str | None, typer.Argument(help="A file in methods/, such as simclr.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every method, with a summary at the end.")] = False,
) -> None:
    """Prints the parity table of a method: ranks × chunks against the paper's formula, and wrong constructions."""
    from kilobatch.launch.cli import tables
    from kilobatch.launch.recipes import method_options

    if (method is None) != everything:
        raise Refusal("give a method's name, such as simclr, or --all")
    if method is None:
        from kilobatch.methods.parity.lookup import known

        names = sorted({*method_options.names(), *known()})  # of several forms of a method, each
    else:
        names = [method]
    raise typer.Exit(0 if tables.parity(names) else 1)


def main(argv: list[str] | None = None) -> None:
    """Exits with 0, 1 (a worker or a check failed), 2 (refused) or 130 (interrupted)."""
    try:
        app(argv)
    except Refusal as refusal:
        print(f"kilobatch: {refusal}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
