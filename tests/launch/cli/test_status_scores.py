"""`kilobatch status`: accuracies beside their baselines, remarks on how runs learn, and durations."""

import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from kilobatch.launch.cli.reports.status import format_duration, render
from kilobatch.launch.runs import run_folder
from kilobatch.launch.runs.overview import overview
from kilobatch.launch.runs.run_folder import RunOptions
from kilobatch.trainer.evaluate.baselines.baselines_file import Baselines, write_all_baselines
from kilobatch.trainer.monitor.progress_file import Note, Progress
from tests.launch.conftest import CommandResult

Kilobatch = Callable[..., CommandResult]
KNN = "k-NN (k 5, temperature 0.07; 1,437 training images with their labels; 360 test images)"
SHARES = "trained encoder 97.80%, raw pixels 98.30%, untrained encoder 90.00%, chance 10.00%"


def make(name: str, *notes: Note, knn: float | None = None, knn_sample: float | None = None) -> Path:
    run = run_folder.create_run(RunOptions(name=name), "demo", "run: {}\n", 1)
    run_folder.set_status(run, "finished", 1)
    progress = Progress(step=9, steps=9, epoch=3, epochs=3, time=time.time(), loss=1.5, knn=knn, knn_sample=knn_sample)
    progress.notes = list(notes)
    progress.write(run)
    return run


def compared(run: Path, used: int, whole: int) -> None:
    common = {"k": 5, "temperature": 0.07, "classes": 10, "pixels": 0.983, "untrained": 0.9}
    images = {"train_images": used, "all_train_images": whole, "test_images": 360, "all_test_images": 360}
    other = Baselines(key="other", in_use=False, **common | {"k": 1}, **images)
    write_all_baselines(run, [other, Baselines(key="own", in_use=True, **common, **images)])


def shown(width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        console.print(render(overview([]), console))
    return captured.get().splitlines()


def test_accuracies_have_company(kilobatch: Kilobatch) -> None:
    for name in ("a", "b"):
        compared(make(name, knn=0.978), 1437, 1437)
    header, first, _, below = shown(200)
    columns = dict(zip(header.split(), first.split(), strict=True))
    assert [columns[name] for name in ("k-NN", "pixels", "untrained", "chance")] == ["97.8%", "98.3%", "90.0%", "10.0%"]
    assert below == f"a, b: {KNN}"
    header, _, _, *below = shown(40)
    assert "untrained" not in header
    assert " ".join(" ".join(below).split()) == f"a, b: {KNN}: {SHARES}"
    assert json.loads(kilobatch("status", "a", "--json").out)[0]["baselines"]["pixels"] == 0.983


def test_a_sample_is_compared_with_the_encoder_on_that_sample(kilobatch: Kilobatch) -> None:
    compared(make("c", knn=0.99, knn_sample=0.978), 2048, 50000)
    header, first, below = shown(200)
    assert "untrained" not in header and "99.0%" in first
    assert below == f"c: {KNN.replace('1,437', 'a sample of 2,048 of 50,000')}: {SHARES}"


def test_a_run_that_does_not_learn_is_named(kilobatch: Kilobatch) -> None:
    queue = Note(kind="queue", step=2, text="the loss rises until about step 6")
    make("d", Note(kind="loss", step=5, text="the loss is about 9, far above 2 at its start"), queue)
    assert kilobatch("status").out.splitlines()[2:] == [
        "d: warning (from step 5 on): the loss is about 9, far above 2 at its start",
        "d: note (from step 2 on): the loss rises until about step 6",
    ]
    assert json.loads(kilobatch("status", "--json").out)[0]["notes"][0]["kind"] == "loss"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0s"), (59.6, "1m"), (125, "2m"), (3599, "1h00m"), (11100, "3h05m"), (190000, "2d04h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words
