"""The commands: `kilobatch --help`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from data.refusal import Refusal

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


@app.command()
def recipes(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a recipe instead.")] = False,
) -> None:
    """Lists the recipes and what each reproduces."""
    if schema:
        from launch.recipe import schema as recipe_schema

        print(json.dumps(recipe_schema(), indent=2))
        return
    from launch import tables

    tables.recipes()


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes, such as optimizer.lr=4.8", metavar="[a.b=value]...")
    ] = None,
    workers: Workers = None,
) -> None:
    """Trains a recipe in a new run folder."""
    from launch import training

    raise typer.Exit(training.train(recipe, overrides or [], workers))


@app.command()
def resume(run: Run, workers: Workers = None) -> None:
    """Goes on with a run from its newest whole checkpoint."""
    from launch import training

    raise typer.Exit(training.resume(run, workers))


@app.command("eval")
def evaluate(
    run: Run,
    knn: Annotated[bool, typer.Option("--knn", help="Weighted k-NN.")] = False,
    linear: Annotated[bool, typer.Option("--linear", help="Linear probe by the papers' protocol.")] = False,
    fast_linear: Annotated[bool, typer.Option("--fast-linear", help="Linear probe on cached features.")] = False,
    test: Annotated[str | None, typer.Option(help="Test images, if not the recipe's.", show_default=False)] = None,
    workers: Workers = None,
) -> None:
    """Evaluates the encoder of a run."""
    from launch import training

    asked = {"knn": knn, "linear": linear, "fast_linear": fast_linear}
    raise typer.Exit(training.evaluate(run, [name for name, wanted in asked.items() if wanted], test, workers))


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
    from launch import converting

    if verify is not None:
        converting.verify(verify, source, out)
    else:
        converting.convert(source, out, split=split, max_side=max_side, quality=quality, skip_broken=skip_broken)


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Writes a run's encoder as safetensors, with torchvision's names."""
    from launch import converting

    converting.export(run, out, force=force)


@app.command()
def verify(
    method: Annotated[str, typer.Argument(help="A file in methods/, such as simclr.", show_default=False)],
) -> None:
    """Prints the parity table of a method: ranks × chunks against the paper's formula, and wrong constructions."""
    from launch import tables

    raise typer.Exit(0 if tables.parity(method) else 1)


def main(argv: list[str] | None = None) -> None:
    """Exits with 0, 1 (a worker or a check failed), 2 (refused) or 130 (interrupted)."""
    try:
        app(argv)
    except Refusal as refusal:
        print(f"kilobatch: {refusal}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
