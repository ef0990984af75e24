"""Arguments and options that several commands take, with their help texts."""

from pathlib import Path
from typing import Annotated

import typer

from kilobatch.launch.cli.usage_errors import refuse_override

Run = Annotated[
    str,
    typer.Argument(help="A run's folder, or its name under runs/.", show_default=False, callback=refuse_override),
]
Recipe = Annotated[
    str,
    typer.Argument(
        help="A recipe's name (kilobatch recipes lists them), or a YAML file.",
        show_default=False,
        callback=refuse_override,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe, such as optimizer.lr=4.8", metavar="a.b=value"),
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Number of worker processes on this machine. Default: for a run that exists, as many as before; "
        "else one for each GPU, or 1 without a GPU."
    ),
]
NewRunWorkers = Annotated[
    int | None,
    typer.Option(
        "--workers", help="Number of worker processes on this machine. Default: one for each GPU, or 1 without a GPU."
    ),
]
ClusterName = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="The cluster that gets the job: a YAML file, a name in ~/.config/kilobatch/cluster.yaml, or local, "
        "which runs it in the background of this machine.",
        show_default=False,
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        help="Name of the run, sweep or pipeline, and of its folder. Default: the recipe and the time.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check everything, and create nothing: print what the scheduler would get or, for a run on this machine, "
        "its resolved recipe.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for use in scripts, instead of a table.")]
SafetensorsFile = Annotated[Path, typer.Argument(help="The .safetensors file to write.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")]
Anyway = Annotated[
    bool,
    typer.Option("--anyway", help="Train even if, by kilobatch plan, it cannot fit into this machine's memory."),
]
DataRoot = Annotated[
    list[str] | None,
    typer.Option(
        "--data-root",
        help="Data that lay in the folder OLD lie in NEW now; their content is compared as ever.",
        metavar="OLD=NEW",
        show_default=False,
    ),
]
