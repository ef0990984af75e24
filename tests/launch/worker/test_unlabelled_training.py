"""A training on images without labels, and on images of which some have labels, by which k-NN then votes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.in_process_runs import tiny_training
from tests.helpers.process_groups import run_ranks


def write_list(root: Path, labelled: int) -> Path:
    """16 images, the first of which have labels."""
    root.mkdir()
    lines = []
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)):
        Image.fromarray(pixels).save(root / f"{i:02}.png")
        lines.append(f"{i:02}.png" + ("\tbird" if i % 2 else "\tcat") * (i < labelled))
    (root / "train.txt").write_text("\n".join(lines))
    return root / "train.txt"


def trainings(folder: Path) -> list[tuple[int, str, list[dict[str, float]]]]:
    """Exit code, what was printed and metrics of a training without labels and of one with ten."""
    found = []
    for labelled, test in ((0, ["data.test=null"]), (10, [])):
        images = write_list(folder / f"images{labelled}", labelled)
        ended = tiny_training(folder / f"runs{labelled}", f"data.train=list:{images}", *test)
        metrics = folder / f"runs{labelled}" / "r" / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        found.append((ended.code, ended.printed, [json.loads(line) for line in lines]))
    return found


@pytest.mark.slow
def test_images_without_labels_are_trained_on_and_the_others_scored_by(tmp_path: Path):
    without, some = run_ranks(1, trainings, tmp_path, timeout=400.0)[0]
    assert (without[0], some[0]) == (0, 0), without[1] + some[1]
    losses = [[line["train/loss"] for line in lines if "train/loss" in line] for *_, lines in (without, some)]
    assert len(losses[0]) == 6 and losses[0] == losses[1]  # labels change no loss
    scored = ["knn/top1" in "".join(map(str, lines)) for *_, lines in (without, some)]
    assert scored == [False, True] and "10 training images with their labels" in some[1], some[1]
