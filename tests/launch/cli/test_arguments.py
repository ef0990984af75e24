"""Arguments that a command does not understand, in one plain message; and the examples of each command's help."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from kilobatch.launch.__main__ import app
from kilobatch.launch.cli.examples import EXAMPLES
from kilobatch.launch.pipelines.stages import PipelineRequest, plan_pipeline
from kilobatch.launch.recipes.method_options import method_names
from kilobatch.launch.recipes.recipe import read_recipe
from tests.launch.cli.test_surroundings import ASCII

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
PLACE = "'schedule.epochs=3' changes a recipe, and stands where kilobatch"
MESSAGES = {
    "resume schedule.epochs=3": f"{PLACE} resume has its RUN; write it after that: kilobatch resume RUN schedule.epo",
    "resume schedule.epochs=3 first": f"{PLACE} resume has its RUN",
    "train schedule.epochs=3 demo": f"{PLACE} train has its RECIPE",
    "branch first schedule.epochs=3": f"{PLACE} branch has its NEW",
    "status schedule.epochs=3": f"{PLACE} status has its RUN; kilobatch status takes no such changes",
    "cancel schedule.epochs=3": f"{PLACE} cancel has its RUN",
    "verify schedule.epochs=3": f"{PLACE} verify has its METHOD",
    "export r out.safetensors lr=1": "'lr=1' changes a recipe, and kilobatch export takes no changes; train, submit, ",
    "logs r lr=1": "'lr=1' changes a recipe, and kilobatch logs takes no changes",
    "bench lr=1": "'lr=1' changes a recipe, and stands where kilobatch bench has its RECIPE",
    "verify simclr lr=1": "'lr=1' changes a recipe, and kilobatch verify takes no changes",
    "data.batch=3 train demo": "'data.batch=3' changes a recipe, and comes after it: kilobatch train RECIPE data.bat",
    "train demo --data.batch=3": "written without dashes: data.batch=VALUE",
    "resume r --epochs 3": "kilobatch resume has no option --epochs; options of the recipe are written without dashes: "
    "schedule.epochs=VALUE or evaluate.linear.epochs=VALUE",
    "eval r --batch 3": "written without dashes: evaluate.linear.batch=VALUE",
    "train demo --wokrers 2": "has no option --wokrers; did you mean '--workers'? kilobatch train --help lists what",
    "train demo --cluster local": "has no option --cluster (these have: submit, pipeline, resume, drill)",
    "train": "kilobatch train needs RECIPE, a recipe's name (kilobatch recipes lists them), or a YAML file. For exam",
    "tarin demo": "there is no command 'tarin'; did you mean 'train'? known: recipes, init, options, train, ",
    "train demo --workers two": "kilobatch train: --workers is 'two': it should be a valid integer",
    "train demo --workers=two": "--workers is 'two'",
    "train demo --workers": "option '--workers' needs a value; kilobatch train --help",
    "bench --device tpu": "--device is 'tpu': it should be one of 'auto', 'cpu', 'cuda'",
    "convert a b.beton --split tset": "--split is 'tset': it should be one of 'train', 'test'",
    "export r a.safetensors b": "does not know what to do with 'b': it takes RUN OUT; kilobatch export --help",
    "verify simclr y": "does not know what to do with 'y': it takes METHOD; kilobatch verify --help",
    "eval r --knn=3": "option '--knn' does not take a value; kilobatch eval --help",
    "--quiet": "No such option: --quiet; kilobatch COMMAND --help",
}


@pytest.mark.parametrize("words", MESSAGES)
def test_a_word_in_the_wrong_place(words: str, kilobatch: Callable) -> None:
    result = kilobatch(*words.split())
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("kilobatch: ") and result.err.count("\n") == 1
    assert MESSAGES[words] in result.err


def test_a_run_may_have_such_a_name(kilobatch: Callable, tmp_path: Path) -> None:
    (tmp_path / "runs" / "lr=3").mkdir(parents=True)
    assert "runs/lr=3 is not a run: it holds no recipe.yaml" in kilobatch("resume", "lr=3").err


def test_in_a_narrow_locale_of_ascii_without_a_terminal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kilobatch", "resume", "schedule.epochs=3"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | ASCII, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode("ascii") == f"kilobatch: {MESSAGES['resume schedule.epochs=3']}chs=3\n"


# Examples


def test_every_command_has_examples() -> None:
    assert {name for name, command in COMMANDS.items() if not command.hidden} <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_help_of_a_command_ends_with_its_examples(
    name: str, kilobatch: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    _, _, shown = kilobatch(name, "--help").out.partition("Examples:")
    assert "".join(shown.split()) == "".join("".join(EXAMPLES[name]).split())


@pytest.mark.parametrize("example", [example for examples in EXAMPLES.values() for example in examples])
def test_an_example_is_understood(example: str) -> None:
    """Its options exist, and its recipes and the options of these."""
    program, name, *words = shlex.split(example)
    assert program == "kilobatch"
    given = COMMANDS[name].make_context(name, words).params
    changes = list(given.get("overrides") or [])
    for sweep in given.get("sweep") or []:
        key, _, values = sweep.partition("=")
        changes += [f"{key}={value}" for value in re.split(",", values)]
    if name == "pipeline":
        plan_pipeline(PipelineRequest(given["recipe"], changes, given["labels"]), None)
    else:
        read_recipe(given.get("recipe") or "demo", changes)
    assert given.get("method") in (None, *method_names())
