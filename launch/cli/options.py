"""Arguments and options of the commands, with their help texts; resource_options.py has those of jobs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

# of several commands
Run = Annotated[str, typer.Argument(help="A run's folder, or its name under runs/.", show_default=False)]
Recipe = Annotated[
    str, typer.Argument(help="A recipe's name (kilobatch recipes lists them), or a YAML file.", show_default=False)
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
FromStep = Annotated[
    int | None,
    typer.Option(
        "--from",
        help="The step of an earlier checkpoint to go on from. Newer ones are set aside. Default: the newest one.",
        metavar="STEP",
        show_default=False,
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
    bool, typer.Option("--dry-run", help="Print what would be given to the scheduler, and create nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for use in scripts, instead of a table.")]
SafetensorsFile = Annotated[Path, typer.Argument(help="The .safetensors file to write.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")]

# recipes
Schema = Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes instead of the list.")]

# resume
AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes",
        help="Go on although data or recipe have changed since the run began; the changes are recorded.",
    ),
]

# submit
Sweep = Annotated[
    list[str] | None,
    typer.Option(
        help="One run for each value: KEY=A,B,C. Given several times: one for each combination.", show_default=False
    ),
]

# pipeline
StageOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes to the recipe of one stage, such as finetune.schedule.epochs=3, or of all stages, such as "
        "optimizer.momentum=0.8",
        metavar="stage.a.b=value",
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        help="The labels that fine-tuning may use: a share of them such as 1%, or a file with the names of images. "
        "Default: the recipe's.",
        metavar="1%",
    ),
]
Pretrained = Annotated[
    str | None,
    typer.Option(help="Start from this run or exported file, and leave out the pre-training.", show_default=False),
]
SelfDistill = Annotated[bool, typer.Option("--self-distill", help="Distil into a student as large as its teacher.")]

# cancel, status
JobRuns = Annotated[
    list[str], typer.Argument(help="Runs, sweeps or pipelines, by their folders or names.", show_default=False)
]
ListedRuns = Annotated[
    list[str] | None,
    typer.Argument(
        help="Runs, sweeps or other folders of runs. Default: those under runs/.",
        metavar="RUN",
        show_default=False,
    ),
]
ListedSweep = Annotated[
    str | None, typer.Option("--sweep", help="Show the runs of this sweep, the best first.", show_default=False)
]
AllRuns = Annotated[bool, typer.Option("--all", help="Show also the runs that ended over a week ago.")]
Watch = Annotated[bool, typer.Option("--watch", help="Show it again every 10 seconds, until Ctrl-C.")]

# logs
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Keep printing new lines until the run is over.")]
Rank = Annotated[int | None, typer.Option(help="Print the lines of this rank only.", show_default=False)]
Lines = Annotated[
    int | None, typer.Option("--lines", "-n", help="Print only this many lines, the last ones.", show_default=False)
]

# plan
Gpu = Annotated[
    str,
    typer.Option(
        help="Type of GPU: h100, h200, a100, a100-40, v100, v100-16 or l40s; or cpu, the default.", show_default=False
    ),
]
Nodes = Annotated[int, typer.Option(help="Number of machines.")]
GpusPerNode = Annotated[int, typer.Option(help="Number of GPUs (with cpu: of workers) on each machine.")]
Images = Annotated[
    int | None,
    typer.Option(help="Number of training images, if the data set is not on this machine.", show_default=False),
]
Classes = Annotated[int, typer.Option(help="Number of classes, for methods that classify.")]
Cores = Annotated[
    int | None, typer.Option(help="Number of CPU cores of each machine, for the loader.", show_default=False)
]
Memory = Annotated[
    float | None,
    typer.Option(help="Memory of one GPU in GiB, if it is not that of the data sheet.", show_default=False),
]
Measured = Annotated[
    Path | None, typer.Option(help="Use the rates in this file of kilobatch bench --json.", show_default=False)
]

# bench
BenchDevice = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="The device to measure.")]
BenchRanks = Annotated[
    int | None,
    typer.Option(
        help="Number of processes for the collectives. Default: one for each GPU, at most 8; without GPUs 2. "
        "With 1, they are left out.",
        show_default=False,
    ),
]
BenchFile = Annotated[
    Path | None,
    typer.Option(
        "--json", help="Write the results to this file as well, for kilobatch plan --measured.", show_default=False
    ),
]

# eval
EvaluateOverrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the section evaluate, such as evaluate.knn.k=20", metavar="evaluate.b=value"),
]
Knn = Annotated[bool, typer.Option("--knn", help="Weighted k-nearest-neighbour classification.")]
Linear = Annotated[bool, typer.Option("--linear", help="Linear probe, trained by the papers' protocol.")]
FastLinear = Annotated[
    bool, typer.Option("--fast-linear", help="Linear probe, trained on features that are computed once.")
]
Classify = Annotated[
    bool, typer.Option("--classify", help="The run's own classifier, on test images as they are and on moved ones.")
]
TrainImages = Annotated[
    str | None,
    typer.Option(
        "--train",
        help="Training images instead of the run's, for k-NN and probes: a .beton file or a source.",
        show_default=False,
    ),
]
TestImages = Annotated[
    str | None,
    typer.Option("--test", help="Test images instead of the run's: a .beton file or a source.", show_default=False),
]

# convert
Source = Annotated[
    str | None, typer.Argument(help="The images to read: folder:PATH, cifar10:PATH, npz:PATH, digits, …")
]
BetonFile = Annotated[Path | None, typer.Argument(help="The .beton file to write.")]
MaxSide = Annotated[
    int | None, typer.Option(help="Shrink images whose longer side has more pixels than this.", show_default=False)
]
MinSide = Annotated[
    int | None,
    typer.Option(help="With --max-side: but leave the shorter side this many pixels.", show_default=False),
]
ValueRange = Annotated[
    str | None,
    typer.Option(
        "--range",
        help="In images of more than 8 bits, the values that become black and white. Default: measured over all.",
        metavar="LOW,HIGH",
        show_default=False,
    ),
]
Quality = Annotated[int, typer.Option(help="Quality of the JPEGs that are written, from 1 to 100.")]
Split = Annotated[Literal["train", "test"], typer.Option(help="The part to read, of sources that have two.")]
SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Leave out images that cannot be read, instead of stopping.")
]
VerifiedFile = Annotated[
    Path | None,
    typer.Option("--verify", help="Write nothing; check every byte of this .beton file.", show_default=False),
]
AdoptedFile = Annotated[
    Path | None,
    typer.Option(
        "--adopt",
        help="Check every image of this .beton file, which FFCV or an older kilobatch wrote, and write the note "
        "beside it that training needs. The file stays as it is.",
        show_default=False,
    ),
]
ClassNames = Annotated[
    Path | None,
    typer.Option("--classes", help="With --adopt: a text file, the name of a class in each line.", show_default=False),
]
LabelField = Annotated[
    str | None,
    typer.Option("--label", help="With --adopt: the field with the labels, of several.", show_default=False),
]

# export, import
Whole = Annotated[
    bool, typer.Option("--whole", help="Write the whole method, for other runs to start from or to use as a teacher.")
]
Checkpoint = Annotated[
    Path,
    typer.Argument(help="A TensorFlow checkpoint: its name, one of its files, or its folder.", show_default=False),
]
Projections = Annotated[
    bool, typer.Option("--projections", help="Take the projection head, even if there is a classifier as well.")
]
ClassifierAfter = Annotated[
    int | None,
    typer.Option(
        help="Take the classifier, with this many layers of the projection head in front of it.", show_default=False
    ),
]

# verify
MethodName = Annotated[str | None, typer.Argument(help="A method's name, such as simclr.", show_default=False)]
AllMethods = Annotated[bool, typer.Option("--all", help="Check every method, and print a summary at the end.")]
