"""A training on images without labels, and on images of which some have labels, by which k-NN then votes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.in_process_runs import tiny_training


def write_list(root: Path, labelled: int) -> Path:
    """16 images, the first of which have labels."""
    root.mkdir()
    lines = []
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)):
        Image.fromarray(pixels).save(root / f"{i:02}.png")
        lines.append(f"{i:02}.png" + ("\tbird" if i % 2 else "\tcat") * (i < labelled))
    (root / "train.txt").write_text("\n".join(lines))
    return root / "train.txt"


@pytest.mark.slow
def test_images_without_labels_are_trained_on_and_the_others_scored_by(tmp_path: Path):
    steps: list[float] = []
    for labelled, test in ((0, ["data.test=null"]), (10, [])):
        images = write_list(tmp_path / f"images{labelled}", labelled)
        folder = tmp_path / f"runs{labelled}"
        ended = tiny_training(folder, f"data.train=list:{images}", *test)
        assert ended.code == 0, ended.printed
        lines = [json.loads(line) for line in (folder / "r" / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        scored = [line for line in lines if "knn/top1" in line]
        assert len(losses) == 6 and bool(scored) == bool(labelled)
        assert labelled == 0 or "10 training images with their labels" in ended.printed, ended.printed
        steps = steps or losses
    assert steps == losses  # labels change no loss
