"""Trainings whose epochs are made of labels: their steps, what evaluators learn from, and a resume to the same bits."""

import json
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest

from kilobatch.trainer.checkpoint.description import list_checkpoints
from kilobatch.trainer.checkpoint.reader import open_saved
from tests.helpers.in_process_runs import copy_of, kilobatch, same_bits, stop_at, train_tiny, weights
from tests.helpers.process_groups import run_ranks

BY_CLASS = ("data.order.long_tailed.ratio=2", "data.order.images_per_class=2", "data.batch=4")
BALANCED = ("data.order.class_balanced=true", "optimizer.weight_decay=0.2", "optimizer.final_weight_decay=0.4")


def column(run: Path, name: str) -> list[float | None]:
    """A value of each step's line in metrics.jsonl; None where a line has none."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line.get(name) for line in lines if "train/loss" in line]


def scenarios(folder: Path) -> dict[str, Any]:
    """Of 16 images in two classes the order by class leaves 8 + 4, which makes 3 steps an epoch, and 3 epochs."""
    by_class, shuffled = train_tiny(folder / "by-class", *BY_CLASS), train_tiny(folder / "shuffled")
    balanced = train_tiny(folder / "balanced", *BALANCED)
    stopped = copy_of(by_class, folder / "stopped")
    stop_at(stopped, 4)  # in mid-epoch
    resumed = kilobatch("resume", str(stopped))
    meta = open_saved(list_checkpoints(by_class / "checkpoints")[9]).meta
    other = copy_of(by_class, folder / "other")
    stop_at(other, 4)
    text = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(text.replace("ratio: 2.0", "ratio: 10.0"))
    return {
        "resumed": (resumed.code, resumed.printed, same_bits(weights(stopped), weights(by_class))),
        "meta": {name: meta[name] for name in ("step", "steps_per_epoch", "images")},
        "differs": [not same_bits(weights(shuffled), weights(run)) for run in (by_class, balanced)],
        "decays": [column(run, "train/weight_decay") for run in (balanced, shuffled)],
        "other": kilobatch("resume", str(other)).printed,
        "accepted": kilobatch("resume", str(other), "--accept-changes").printed,
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(1, scenarios, tmp_path_factory.mktemp("runs"), timeout=240.0)[0]


def test_an_order_makes_the_steps_of_the_images_that_it_leaves(found: dict[str, Any]):
    assert found["meta"] == {"step": 9, "steps_per_epoch": 3, "images": 16}
    assert found["differs"] == [True, True]


def test_a_resume_in_mid_epoch_ends_with_the_same_bits(found: dict[str, Any]):
    code, printed, same = found["resumed"]
    assert (code, same) == (0, True), printed


def test_neighbours_are_those_that_were_trained_on(found: dict[str, Any]):
    printed = found["resumed"][1]
    assert "to compare: k-NN (k 3, temperature 0.07; 12 training images with their labels; 16 test" in printed
    assert "\nk-NN top-1 (k 3, temperature 0.07; 12 training images with their labels): " in printed


def test_another_long_tail_is_another_data_set(found: dict[str, Any]):
    assert "data.order.long_tailed.ratio: 2.0, now 10.0" in found["other"]
    assert "labelled images of data.train: SHA-256" in found["other"]
    assert "have 3 steps, and would now have 2, so that no checkpoint says" in found["accepted"], found["accepted"]


def test_a_decay_that_goes_by_a_schedule_is_logged(found: dict[str, Any]):
    by_schedule, constant = found["decays"]
    assert by_schedule == pytest.approx([0.4 - 0.2 * (1 + cos(pi * step / 6)) / 2 for step in range(6)])
    assert constant == [None] * 6
