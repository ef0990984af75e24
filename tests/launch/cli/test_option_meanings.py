"""An option means the same in every command that has it, and nothing is named in two ways."""

import inspect
from typing import Annotated, Any, get_args, get_origin

import typer

from kilobatch.launch.__main__ import app

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
# What each option means: the words that its help begins with, in every command. A new option is to be added here; one
# that is here takes its name and these words, or gets another name.
MEANINGS = {
    "--accept-changes": "Go on although data or recipe have changed since the run began",
    "--account": "Account that the job is charged to",
    "--adopt": "Check every image of this .beton file, which FFCV or an older kilobatch wrote",
    "--all": "All of them",
    "--anyway": "Train even if, by kilobatch plan, it cannot fit into this machine's memory",
    "--array-parallelism": "Runs of a sweep that may run at the same time",
    "--best-first": "The best run first",
    "--class-names": "With --adopt: a text file, the name of a class in each line",
    "--classes": "Number of classes",
    "--classifier-after": "Take the classifier, with this many layers of the projection head in front of it",
    "--classify": "The run's own classifier",
    "--cluster": "The cluster that gets the job",
    "--comment": "A comment, which the scheduler keeps with the job",
    "--constraint": "Features that nodes must have",
    "--cores": "Number of CPU cores of each machine",
    "--cpus-per-worker": "CPU cores for each worker",
    "--data-root": "Data that lay in the folder OLD lie in NEW now",
    "--device": "The device to measure",
    "--dry-run": "Check everything, and create nothing",
    "--exclude": "Nodes that must not be used",
    "--extra": "Another #SBATCH option",
    "--fast-linear": "Linear probe, trained on features that are computed once",
    "--follow": "Keep printing new lines until the run is over",
    "--force": "Overwrite the file if it exists",
    "--from": "The step of the checkpoint to go on from",
    "--gpu": "Type of GPU",
    "--gpu-memory": "Memory of one GPU in GiB",
    "--gpus-per-node": "Number of GPUs on each machine",
    "--hold-out": "Write this share of the images",
    "--hold-out-seed": "With --hold-out: another number holds out other images",
    "--images": "Number of training images",
    "--interface": "Network interface for NCCL and gloo",
    "--json": "Print JSON, for use in scripts, instead of a table",
    "--knn": "Weighted k-nearest-neighbour classification",
    "--label-field": "With --adopt: the field with the labels",
    "--labels": "The labels that fine-tuning may use",
    "--linear": "Linear probe, trained by the recipe's protocol",
    "--lines": "Print only this many lines, the last ones",
    "--max-side": "Shrink images whose longer side has more pixels than this",
    "--measured": "Use the rates in this file of kilobatch bench --out",
    "--mem-gb": "Memory on each node, in GB",
    "--method": "A method",
    "--min-side": "With --max-side: but leave the shorter side this many pixels",
    "--moved": "k-NN on test images that are turned, shifted and scaled",
    "--name": "Name of the run, sweep or pipeline, and of its folder",
    "--nodes": "Number of machines",
    "--out": "The file to write",
    "--partition": "Partition to queue the job in",
    "--photo-side": "The longer side of the photographs in pixels, as converted",
    "--picture": "A picture of test images with their nearest neighbours",
    "--pretrained": "Start from this run or exported file",
    "--teacher": "Let this run or file teach",
    "--projections": "Take the projection head",
    "--python": "Command that starts Python on a node",
    "--qos": "Quality of service",
    "--quality": "Quality of the JPEGs that are written",
    "--range": "In images of more than 8 bits, the values that become black and white",
    "--rank": "Print the lines of this rank only",
    "--schema": "Print the JSON schema of recipes",
    "--scratch": "Also train the fine-tuned network from scratch on the same labels",
    "--self-distill": "Distil into a student as large as its teacher",
    "--setup": "Shell command to run before the workers start",
    "--signal-lead": "Seconds before the time limit at which the job has to stop and save",
    "--skip-broken": "Leave out images that cannot be read",
    "--split": "The part to read, of sources that have two",
    "--sweep": "One run for each value",
    "--test": "Test images instead of the run's",
    "--time": "Time limit of the job",
    "--train": "Training images instead of the run's",
    "--verify": "Write nothing; check every byte of this .beton file",
    "--watch": "Show it again every 10 seconds, until Ctrl-C",
    "--whole": "Write the whole method",
    "--workers": "Number of worker processes on this machine",
    "--workers-per-node": "Number of workers on each machine",
}


def uses() -> dict[str, dict[str, Any]]:
    """Each option's parameters, by command."""
    found: dict[str, dict[str, Any]] = {}
    for name, command in COMMANDS.items():
        for param in command.params:
            for option in [option for option in param.opts if option.startswith("--")]:
                found.setdefault(option, {})[name] = param
    return found


def test_every_option_is_in_the_table() -> None:
    assert sorted(uses()) == sorted(MEANINGS)


def test_an_option_means_the_same_everywhere() -> None:
    deviating = [
        f"kilobatch {name} {option}: '{param.help}' does not begin with '{MEANINGS[option]}'"
        for option, commands in uses().items()
        for name, param in commands.items()
        if not param.help.startswith(MEANINGS[option])
    ]
    assert not deviating


def test_an_option_takes_the_same_everywhere() -> None:
    for option, commands in uses().items():
        kinds: dict[str, tuple[str, str | None]] = {}
        for name, param in commands.items():
            declared = inspect.signature(COMMANDS[name].callback).parameters[param.name].annotation
            kind = get_args(declared)[0] if get_origin(declared) is Annotated else declared
            own = [one for one in get_args(kind) or [kind] if one is not type(None)]  # of `int | None` the int
            kinds[name] = str(own), param.metavar
        assert len(set(kinds.values())) == 1, f"{option}: {kinds}"


def test_a_meaning_has_one_name() -> None:
    assert len(set(MEANINGS.values())) == len(MEANINGS)
