"""Runs whose one worker trains in the process that gives the command: for tests that resume a run dozens of times."""

import contextlib
import io
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kilobatch.data.errors import UserError
from kilobatch.launch.__main__ import main
from kilobatch.launch.jobs import submit
from kilobatch.launch.processes import launcher
from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.recipes.data import PreparedData
from kilobatch.launch.recipes.recipe import load_recipe
from kilobatch.launch.runs import run_folder
from kilobatch.launch.worker import main as worker
from kilobatch.launch.worker.components import data_of
from kilobatch.launch.worker.process_group import World
from kilobatch.trainer.checkpoint.description import list_checkpoints
from kilobatch.trainer.checkpoint.reader import open_saved

TINY = ["data.batch=8", "data.views.size=8", "data.threads=1", "encoder.width=2", "evaluate.knn.k=3"]
TINY += ["evaluate.every_epochs=1", "evaluate.final=[knn]", "schedule.epochs=3", "schedule.warmup_epochs=1"]
TINY += ["checkpoint.every_steps=1", "checkpoint.keep_last=9", "run.log_every=1", "run.device=cpu"]


@dataclass(frozen=True)
class Ended:
    """A command that has ended, and the arguments of the workers that it started: of each start."""

    code: int
    printed: str
    starts: list[int]


def write_images(file: Path, seed: int, names: tuple[str, str] = ("bird", "cat")) -> None:
    """16 images of 16 pixels in two classes, the same for the same seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 16, 3), np.uint8)
    np.savez(file, images=pixels, labels=np.arange(16) % 2, class_names=names)


def train_tiny(folder: Path, *overrides: str) -> Path:
    """A training of 6 steps, 2 an epoch, with a checkpoint of each. Makes the images, too."""
    ended = tiny_training(folder, *overrides)
    assert ended.code == 0, ended.printed
    return folder / "r"


def tiny_training(folder: Path, *overrides: str) -> Ended:
    """The same, with what it printed."""
    folder.mkdir(parents=True)
    write_images(folder / "train.npz", 0)
    write_images(folder / "test.npz", 1)
    data = [f"data.train=npz:{folder}/train.npz", f"data.test=npz:{folder}/test.npz"]
    return kilobatch("train", "demo", *TINY, *data, "run.name=r", f"run.folder={folder}", "--workers", "1", *overrides)


def stop_at(run: Path, step: int) -> None:
    """Makes a run that has ended one that was stopped after a step."""
    for other, path in list_checkpoints(run / "checkpoints").items():
        if other > step:
            shutil.rmtree(path)
    run_folder.set_status(run, "interrupted", 1)


def copy_of(made: Path, folder: Path) -> Path:
    """A copy of a run and its images, in a folder of its own, as if both had been made there."""
    shutil.copytree(made.parent, folder)
    recipe = folder / made.name / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(f"{made.parent}/", f"{folder}/"))
    return folder / made.name


def weights(run: Path) -> dict[str, Tensor]:
    """All tensors of a run's newest checkpoint that its ranks hold together."""
    saved = open_saved(max(list_checkpoints(run / "checkpoints").items())[1])
    return {name: saved.whole(name) for name in saved.names()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kilobatch(*words: str, signalled: bool = False) -> Ended:
    """Runs a command in this process, which is in a process group of one rank. A job is not queued. signalled: the
    worker has received a stop signal when it begins."""
    starts: list[int] = []

    def run_workers(
        folder: Path, workers: int, module: str, arguments: list[str], stall_minutes: float, question: object = None
    ) -> RunOutcome:
        starts.append(workers)
        return RunOutcome("interrupted") if workers > 1 else _train(folder, arguments, signalled)

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), _replaced(run_workers):
        try:
            main([*words])
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Ended(code, printed.getvalue(), starts)


@contextlib.contextmanager
def _replaced(run_workers: object) -> Iterator[None]:
    before, columns = (launcher.run_workers, submit.queue_runs), os.environ.get("COLUMNS")
    launcher.run_workers, submit.queue_runs = run_workers, lambda *arguments, **more: ["1"]  # pyright: ignore
    os.environ.setdefault("COLUMNS", "200")
    try:
        yield
    finally:
        launcher.run_workers, submit.queue_runs = before
        if columns is None:
            del os.environ["COLUMNS"]


def _train(run: Path, arguments: list[str], signalled: bool) -> RunOutcome:
    """Does what a worker does after its start, without leaving this process."""
    recipe, _ = load_recipe(run / "recipe.yaml")
    world = World(0, 1, 0, 1, torch.device("cpu"))
    given = Namespace(run=run, evaluate=[], rest="--rest" in arguments)
    try:
        data = data_of(recipe, world, PreparedData.model_validate_json(arguments[arguments.index("--data") + 1]))
        finished = worker._work(given, recipe, data, world, lambda: signalled)
    except UserError as error:
        print(f"kilobatch: {error}", file=sys.stderr)
        return RunOutcome("refused", 0, lines=[f"kilobatch: {error}"])
    return RunOutcome("finished" if finished else "interrupted")
