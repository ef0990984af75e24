"""Starting weights help: an encoder of one half of the digits, trained on with the other half, against a random one."""

from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from kilobatch.data.sources.specs import open_source
from kilobatch.launch.runs.final_evaluation import read_final_evaluation
from tests.helpers.in_process_runs import kilobatch
from tests.helpers.process_groups import run_ranks

SEEDS = (0, 1, 2)


def write_halves(folder: Path) -> None:
    """half-0.npz and half-1.npz: every other digit of the training images."""
    source = open_source("digits", "train")
    images, labels = zip(*(source[i] for i in range(len(source))), strict=True)
    for half in (0, 1):
        np.savez(folder / f"half-{half}.npz", images=np.stack(images)[half::2], labels=np.array(labels)[half::2])


def trained(folder: Path, name: str, half: int, seed: int, epochs: int, *changes: str) -> float:
    """The k-NN accuracy on moved test digits, in per cent, after a training on one half."""
    short = [f"schedule.epochs={epochs}", "schedule.warmup_epochs=1", "data.batch=238", "engine.precision=bf16"]
    short += [
        "evaluate.every_epochs=0",
        "evaluate.final=[moved]",
        "checkpoint.every_minutes=60",
        "data.threads=1",
        "encoder.width=8",
    ]
    where = [f"data.train=npz:{folder}/half-{half}.npz", f"run.name={name}", f"run.folder={folder}", f"run.seed={seed}"]
    ended = kilobatch("train", "demo", *short, *where, "--workers", "1", *changes)
    assert ended.code == 0, ended.printed
    result = read_final_evaluation(folder / name)
    assert result is not None
    return 100 * result.parts["moved"].logged["final/moved/moved/trained"]


def compare(folder: Path, seed: int) -> tuple[float, float]:
    """With the weights of the other half, and without."""
    write_halves(folder)
    trained(folder, "a", 0, seed, 24)
    begun = trained(folder, "begun", 1, seed, 4, f"encoder.start={folder}/a")
    return begun, trained(folder, "random", 1, seed, 4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_starting_weights_are_worth_five_points_of_knn(tmp_path: Path) -> None:
    found = []
    for seed in SEEDS:
        (tmp_path / str(seed)).mkdir()
        found += run_ranks(1, compare, tmp_path / str(seed), seed, timeout=1200.0)
    gains = [begun - random for begun, random in found]
    print(found)  # with `pytest -s`, for docs/methods/weights.md
    assert min(gains) >= 5, found
    assert mean(gains) >= 5, found
