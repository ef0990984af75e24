"""Arguments and options of the commands of machines.py."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from kilobatch.launch.cli.usage_errors import refuse_override

# recipes
Schema = Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes instead of the list.")]
SchemaMethod = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="A method of your own as FILE.py:Class, whose options --schema prints as well.",
        show_default=False,
    ),
]
ShownRecipe = Annotated[
    str | None,
    typer.Argument(help="Show this recipe: what it reproduces, its command, its settings.", show_default=False),
]

# options
Section = Annotated[
    str | None,
    typer.Argument(
        help="A section, such as data or data.views, or a method, such as simclr. Default: all.", show_default=False
    ),
]

# init
OwnImages = Annotated[
    str,
    typer.Argument(
        help="The images: a folder, a .beton file, list:FILE, tar:PATTERN, … A folder may hold train/ and test/.",
        show_default=False,
    ),
]
Pretraining = Annotated[str, typer.Option("--method", help="A method that trains without labels.")]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--out", help="The file to write, a .yaml. Default: named after the images.", show_default=False),
]
OwnGpu = Annotated[
    str | None,
    typer.Option(
        help="Type of GPU that will train, as for kilobatch plan, or cpu. Default: this machine.",
        show_default=False,
    ),
]
OwnGpusPerNode = Annotated[
    int | None,
    typer.Option(
        help="Number of GPUs on each machine. Default: this machine's, or 1 of a type that is named.",
        show_default=False,
    ),
]

# plan
Gpu = Annotated[
    str,
    typer.Option(
        help="Type of GPU: h100, h200, a100, a100-40, v100, v100-16 or l40s, or its full name; or cpu, this machine's, "
        "which is the default.",
        show_default=False,
    ),
]
Nodes = Annotated[int, typer.Option(help="Number of machines.")]
GpusPerNode = Annotated[
    int | None, typer.Option(help="Number of GPUs on each machine. Default: 1.", show_default=False)
]
WorkersPerNode = Annotated[
    int | None,
    typer.Option(help="Number of workers on each machine, where they train on CPUs. Default: 1.", show_default=False),
]
Images = Annotated[
    int | None,
    typer.Option(help="Number of training images, if the data set is not on this machine.", show_default=False),
]
Classes = Annotated[int, typer.Option(help="Number of classes, for methods that classify.")]
Cores = Annotated[
    int | None, typer.Option(help="Number of CPU cores of each machine, for the loader.", show_default=False)
]
GpuMemory = Annotated[
    float | None,
    typer.Option(
        help="Memory of one GPU in GiB, if it is not that of the data sheet (with cpu: of one worker).",
        show_default=False,
    ),
]
Measured = Annotated[
    Path | None,
    typer.Option(
        help="Use the rates in this file of kilobatch bench --out. Default: for this machine those of its newest "
        "bench, if there was one.",
        show_default=False,
    ),
]
PhotoSide = Annotated[
    int | None,
    typer.Option(
        help="The longer side of the photographs in pixels, as converted. Default: that of the data, if they are on "
        "this machine.",
        metavar="PIXELS",
        show_default=False,
    ),
]

# bench
BenchRecipe = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe whose views and step are measured, on one worker. Default: measure what kilobatch plan takes.",
        show_default=False,
        callback=refuse_override,
    ),
]
BenchDevice = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="The device to measure.", case_sensitive=False)
]
BenchWorkers = Annotated[
    int | None,
    typer.Option(
        help="Number of worker processes on this machine, for the collectives. Default: one for each GPU, at most 8; "
        "without GPUs 2. With 1, they are left out.",
        show_default=False,
    ),
]
BenchFile = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="The file to write the results to as well, as JSON for kilobatch plan --measured.",
        show_default=False,
    ),
]

# verify
MethodName = Annotated[
    str | None,
    typer.Argument(
        help="A method's name, such as simclr; or FILE.py:Class, or an encoder that is not kilobatch's own, such as "
        "timm/convnext_atto.",
        show_default=False,
        callback=refuse_override,
    ),
]
AllMethods = Annotated[
    bool, typer.Option("--all", help="All of them: check every method, and print a summary at the end.")
]

# new
NewKind = Annotated[Literal["method"], typer.Argument(help="What to write: method.")]
NewName = Annotated[str, typer.Argument(help="The file's name, without .py.", show_default=False)]
