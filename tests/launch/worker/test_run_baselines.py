"""A run's baselines: made once, kept, shown with every evaluation, and without a trace in the training."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kilobatch.launch.processes import launcher
from kilobatch.launch.worker import main as worker_main
from kilobatch.trainer.evaluate.baselines import measurement
from kilobatch.trainer.evaluate.baselines.baselines_file import FILE, read_all_baselines, read_baselines
from kilobatch.trainer.monitor.monitor import TIMINGS
from tests.helpers import worker_in_process
from tests.launch.conftest import CommandResult

Kilobatch = Callable[..., CommandResult]
SMALL = ["demo", "data.train=npz:train.npz", "data.test=npz:test.npz", "data.batch=8", "data.views.size=8"]
SMALL += ["encoder.width=2", "data.threads=1", "schedule.epochs=2", "schedule.warmup_epochs=1", "run.log_every=1"]
SMALL += ["evaluate.knn.k=3", "evaluate.every_epochs=1", "evaluate.final=[knn]", "checkpoint.every_steps=2"]
ALONE = ["--workers", "1"]


@pytest.fixture
def trains(kilobatch: Kilobatch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kilobatch:
    """Runs commands whose worker is this process, on 24 images in two classes."""
    monkeypatch.setattr(launcher, "run_workers", worker_in_process.run_workers)
    for seed, split in enumerate(("train", "test")):
        pixels = np.random.default_rng(seed).integers(0, 256, (24, 8, 8, 3), np.uint8)
        np.savez(f"{split}.npz", images=pixels, labels=np.arange(24) % 2, class_names=["ant", "bee"])
    return kilobatch


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def test_they_are_made_once_and_shown_with_every_evaluation(trains: Kilobatch) -> None:
    run = Path("runs/r")
    said = trains("train", *SMALL, "run.name=r", *ALONE)
    assert said.code == 0, said.err
    found = read_baselines(run)
    assert found is not None and not found.sampled and found.chance == 0.5
    words = "k-NN (k 3, temperature 0.07; 24 training images with their labels; 24 test images): raw pixels "
    at_start, knn, compared = [line for line in said.out.splitlines() if line.startswith(("before", "k-NN", "to com"))]
    assert at_start.startswith(
        f"before training, {words}{found.pixels:.2%}, untrained encoder {found.untrained:.2%}, ch"
    )
    assert knn.startswith("k-NN top-1 (k 3, temperature 0.07; 24 training images with their labels): ")
    assert compared == f"to compare: {words}{found.pixels:.2%}, untrained encoder {found.untrained:.2%}, chance 50.00%"
    evaluations = [line for line in metrics(run) if "epoch" in line or "final/knn/top1" in line]
    assert len(evaluations) == 3  # after either epoch, and at the end
    assert all(line | found.values() == line for line in evaluations)

    written = (run / FILE).stat().st_mtime_ns
    assert trains("resume", "r", "schedule.epochs=3", *ALONE).code == 0
    assert (run / FILE).stat().st_mtime_ns == written
    (shown,) = [line for line in trains("status", "r").out.splitlines() if words.removesuffix(": raw pixels ") in line]
    assert shown.startswith("r: k-NN (k 3, ")
    row = json.loads(trains("status", "r", "--json").out)[0]
    assert row["baselines"]["untrained"] == found.untrained

    # Another k asks another question: its baselines are kept beside those of the training.
    other = trains("eval", "r", "evaluate.knn.k=1", "--knn", *ALONE)
    assert "before training, k-NN (k 1, " in other.out and "to compare: k-NN (k 1, " in other.out
    assert "before training" not in trains("eval", "r", "evaluate.knn.k=1", "--knn", *ALONE).out
    assert read_baselines(run) == found and [each.k for each in read_all_baselines(run)] == [1, 3]
    line = json.loads(Path("runs/r/evaluations.jsonl").read_text().splitlines()[-1])
    assert line["baselines"]["k"] == 1 and line["knn/chance"] == 0.5

    # A run of an earlier version gets them when it is evaluated; without a flag it is asked what its recipe says.
    (run / FILE).unlink()
    again = trains("eval", "r", *ALONE)
    assert again.code == 0, again.err
    assert "before training, k-NN (k 3, " in again.out and "k-NN top-1 (k 3, " in again.out
    assert read_baselines(run) == found
    pictured = trains("eval", "r", "--moved", "--picture", *ALONE).out
    assert "picture: runs/r/pictures/neighbours.png" in pictured and Path("runs/r/pictures/neighbours.png").is_file()
    offered = trains("eval", "--help").out
    assert "--moved" in offered and "--picture" in offered and "pictures/neighbours.png" in offered
    title = "k-NN from clean training images (k 5, temperature 0.07; 24 training images with their labels)"
    assert title in " ".join(pictured.split()) and "chance" in pictured


def test_of_many_images_a_sample_is_used_and_said(trains: Kilobatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained encoder is asked on the sample, too, beside all images."""
    monkeypatch.setattr(measurement, "TRAIN_IMAGES", 20)
    monkeypatch.setattr(measurement, "TEST_IMAGES", 8)
    said = trains("train", *SMALL, "run.name=r", *ALONE)
    assert said.code == 0, said.err
    *_, last = [line for line in metrics(Path("runs/r")) if "final/knn/top1" in line]
    assert {"final/knn_sample/top1", "knn_sample/pixels", "knn_sample/untrained", "knn_sample/chance"} < last.keys()
    assert last["final/knn_sample/top1"] in {n / 8 for n in range(9)} and "knn/pixels" not in last
    found = read_baselines(Path("runs/r"))
    assert found is not None
    assert "a sample of 20 of 24 training images with their labels; a sample of 8 of 24 test" in found.conditions()
    lines = said.out.splitlines()
    assert f"to compare: k-NN ({found.conditions()}): {found.shares(last['final/knn_sample/top1'])}" in lines
    below = [line for line in trains("status", "r").out.splitlines() if line.startswith("r: k-NN")]
    assert below == [f"r: k-NN ({found.conditions()}): {found.shares(last['final/knn_sample/top1'])}"]


def test_the_training_is_the_same_without_them(trains: Kilobatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """MoCo draws its queue by torch's seed; the generators after the start are those of a run without baselines."""
    options = [*SMALL, "method={name: moco, queue: {length: 24}}", "encoder.norm=local", *ALONE]
    with_them = trains("train", *options, "run.name=with")
    assert with_them.code == 0, with_them.err
    states: list[list[object]] = []
    original = worker_main.with_baselines

    def states_around(suite: object, *arguments: object, **more: object) -> object:
        for around in (True, False):
            states.append([torch.initial_seed(), torch.get_rng_state().tolist(), random.getstate()])
            states[-1].append([str(part) for part in np.random.get_state()])  # noqa: NPY002 - libraries draw from it
            if around:
                original(suite, *arguments, **more)  # pyright: ignore
        return suite

    monkeypatch.setattr(worker_main, "with_baselines", states_around)
    assert trains("train", *options, "run.name=without").code == 0
    assert states[0] == states[1]
    added = ("knn/pixels", "knn/untrained", "knn/chance")
    lines = [{key: value for key, value in line.items() if key not in added} for line in metrics(Path("runs/with"))]
    assert lines == metrics(Path("runs/without"))


def test_images_that_cannot_be_read_leave_the_training_without_them(
    trains: Kilobatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> object:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(measurement, "_features", fails)
        said = trains("train", *SMALL, "run.name=r", *ALONE)
    assert said.code == 0
    assert "left out of all evaluations: RuntimeError: no memory" in said.err
    assert "to compare" not in said.out and not Path("runs/r", FILE).exists()
