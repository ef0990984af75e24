"""Arguments and options of the commands of runs.py; resource_options.py has those of jobs."""

from typing import Annotated

import typer

from kilobatch.launch.cli.usage_errors import refuse_override

# resume
FromStep = Annotated[
    int | None,
    typer.Option(
        "--from",
        help="The step of the checkpoint to go on from; newer ones are set aside. Default: the newest one.",
        metavar="STEP",
        show_default=False,
    ),
]
AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes",
        help="Go on although data or recipe have changed since the run began; the changes are recorded.",
    ),
]

# branch
NewRun = Annotated[
    str,
    typer.Argument(help="The new run: its name under runs/, or a path.", show_default=False, callback=refuse_override),
]
BranchStep = Annotated[
    int | None,
    typer.Option(
        "--from",
        help="The step of the checkpoint to go on from. Default: the newest one.",
        metavar="STEP",
        show_default=False,
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
Teacher = Annotated[
    str | None,
    typer.Option(
        help="Let this run or file teach, of kilobatch or another package, and leave out the stages before.",
        show_default=False,
    ),
]
SelfDistill = Annotated[bool, typer.Option("--self-distill", help="Distil into a student as large as its teacher.")]

Scratch = Annotated[
    bool,
    typer.Option("--scratch", help="Also train the fine-tuned network from scratch on the same labels, to compare."),
]

# cancel, status
JobRuns = Annotated[
    list[str],
    typer.Argument(
        help="Runs, sweeps or pipelines, by their folders or names.", show_default=False, callback=refuse_override
    ),
]
ListedRuns = Annotated[
    list[str] | None,
    typer.Argument(
        help="Runs, sweeps or other folders of runs. Default: those under runs/.",
        metavar="RUN",
        show_default=False,
        callback=refuse_override,
    ),
]
BestFirst = Annotated[
    bool, typer.Option("--best-first", help="The best run first: by top-1 of its classifier or of k-NN, else by loss.")
]
AllRuns = Annotated[bool, typer.Option("--all", help="All of them, also the runs that ended over a week ago.")]
Watch = Annotated[bool, typer.Option("--watch", help="Show it again every 10 seconds, until Ctrl-C.")]

# logs
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Keep printing new lines until the run is over.")]
Rank = Annotated[int | None, typer.Option(help="Print the lines of this rank only.", show_default=False)]
Lines = Annotated[
    int | None, typer.Option("--lines", "-n", help="Print only this many lines, the last ones.", show_default=False)
]
