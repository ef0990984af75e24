"""Moved images and the picture: the same on any number of ranks, and hard for raw pixels."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.sources.specs import open_source
from kilobatch.trainer.evaluate import moved
from kilobatch.trainer.evaluate.features import gather_rows
from kilobatch.trainer.evaluate.image_sample import ImageSample, collect
from kilobatch.trainer.evaluate.images import to_bytes
from kilobatch.trainer.evaluate.picture import _rows_of_many_classes, draw
from tests.helpers.in_memory_data import Block, pixels
from tests.helpers.process_groups import run_ranks

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
NAMES = [f"moved/{test}/{of}" for of in ("pixels", "untrained", "trained") for test in ("clean", "moved")]


def digits(split: Literal["train", "test"], count: int) -> tuple[Tensor, Tensor, list[str]]:
    source = open_source("digits", split)
    rows = [source[i] for i in range(count)]
    images = torch.from_numpy(np.stack([np.asarray(image) for image, _ in rows])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images / 255 - mean) / std, torch.tensor([label for _, label in rows]), list(source.classes)


def mass(batch: Batch) -> Tensor:
    """A poor representation: the sums of rows. Those of columns are another."""
    return batch.views[0][:, 0].mean(1).sum(2)


def columns(batch: Batch) -> Tensor:
    return batch.views[0][:, 0].mean(1).sum(1)


def evaluated() -> tuple[dict[str, float], Tensor, ImageSample]:
    train, test = Block(*digits("train", 300)[:2], batch=64), Block(*digits("test", 100)[:2], batch=64)
    values = dict(moved.evaluate(mass, columns, train, test, MEAN, STD))
    images = torch.cat([batch.views[0][:, 0] for batch in moved.Moved(test, MEAN, STD)])
    return values, gather_rows(images), collect(mass, train, MEAN, STD, most=40)


def test_ranks_evaluate_the_same_images() -> None:
    values, images, sample = evaluated()
    for got, got_images, got_sample in run_ranks(3, evaluated):
        assert got == values
        assert torch.equal(got_images, images)
        assert torch.equal(got_sample.x, sample.x)
        assert torch.equal(got_sample.image, sample.image)
    assert list(values) == NAMES
    assert values["moved/clean/pixels"] > 0.9
    assert values["moved/moved/pixels"] < values["moved/clean/pixels"] - 0.15  # moving makes it hard
    assert (
        len({values[f"moved/clean/{of}"] for of in ("pixels", "untrained", "trained")}) == 3
    )  # each of its own features
    assert len(sample) == 38  # every eighth of 300
    table = moved.table(values)
    assert table.row_count == 2
    assert list(table.columns[1].cells) == [f"{values[f'moved/{test}/pixels']:.1%}" for test in ("clean", "moved")]


def test_moves_are_fixed_small_and_each_its_own() -> None:
    images, labels, _ = digits("test", 12)
    same = images[:1].expand(12, -1, -1, -1)
    first, again = (
        torch.cat([batch.views[0][:, 0] for batch in moved.Moved(Block(same, labels, batch), MEAN, STD)])
        for batch in (12, 5)
    )
    assert torch.equal(first, again)
    assert len({image.numpy().tobytes() for image in first}) == 12
    ink = to_bytes(first, MEAN, STD).float().mean((1, 2, 3)) / to_bytes(same, MEAN, STD).float().mean((1, 2, 3))
    assert 0.3 < ink.min() < ink.max() < 1.25**2 + 0.1  # scaled areas, less what left the image


def test_picture_is_whole(tmp_path: Path) -> None:
    images, labels, classes = digits("test", 60)
    sample = collect(mass, Block(images, labels), MEAN, STD, most=60)
    draw(sample, sample, classes, "sixty digits", tmp_path / "pictures" / "neighbours.png")
    picture = np.asarray(Image.open(tmp_path / "pictures" / "neighbours.png").convert("RGB"))
    assert picture.shape == (880, 1650, 3)
    green, red = ((np.abs(picture - np.array(colour)).sum(2) < 6).sum() for colour in ((42, 157, 92), (209, 73, 91)))
    assert green > 1000  # at the least each image's nearest neighbour, which is itself
    assert red > 1000
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["neighbours.png"]


def test_queries_are_of_as_many_classes_as_possible() -> None:
    label = torch.tensor([3, 3, 3, 0, 0, 1])
    assert _rows_of_many_classes(label, 5).tolist() == [3, 5, 0, 4, 1]


def test_large_images_become_thumbnails() -> None:
    images = torch.zeros(4, 3, 96, 96)
    sample = collect(lambda batch: pixels(batch)[:, :2], Block(images, torch.arange(4)), MEAN, STD, most=3)
    assert sample.image.shape == (2, 3, 64, 64)
    assert sample.label.tolist() == [0, 2]
    assert sample.image[0, :, 0, 0].tolist() == [128, 102, 76]  # the mean, in bytes (76.5 rounds to even)
