"""Findings of `kilobatch init` in trees, lists, saved data sets and converted files: labels, splits, held-out parts."""

from pathlib import Path

import pytest

from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.hold_out import split_source
from kilobatch.data.sources.specs import open_source
from kilobatch.launch.cli.survey import survey
from tests.helpers.photo_sources import CLASSES, synthetic_photos, write_lists, write_saved, write_tree

PHOTOS = synthetic_photos(12, side=20)


def test_splits_beside_and_within(tmp_path: Path):
    for split, photos in (("train", PHOTOS), ("val", PHOTOS[::2])):
        write_tree(tmp_path / "in" / split, photos)
    found = survey(f"tree:{tmp_path}/in")
    assert (found.train, found.test) == (f"tree:{tmp_path}/in/train", f"tree:{tmp_path}/in/val")
    assert (found.images, found.test_images, found.classes, found.side) == (12, 6, 3, 20)
    found = survey(f"tree:{tmp_path}/in?label=none")
    assert found.train == f"tree:{tmp_path}/in/train?label=none"
    assert (found.test, found.classes, found.no_test) == (None, 0, "images without labels have nothing to evaluate by")


def test_lists_and_saved_data_sets(tmp_path: Path):
    pytest.importorskip("pyarrow")
    write_tree(tmp_path, PHOTOS)
    write_lists(tmp_path, PHOTOS, CLASSES)
    (tmp_path / "test.txt").write_text("ant/000.jpg\tant\n")
    found = survey(f"list:{tmp_path}/train.txt")
    assert (found.test, found.test_images, found.classes) == (f"list:{tmp_path}/test.txt", 1, 3)
    assert survey(f"csv:{tmp_path}/train.csv").test is None
    for split in ("train", "test"):
        write_saved(tmp_path / "saved" / split, PHOTOS, CLASSES)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert survey(f"hf:{tmp_path}/saved").test == f"hf:{tmp_path}/saved"
    assert survey(f"hf:{tmp_path}/saved/train").test is None


def test_the_part_that_convert_held_out(tmp_path: Path):
    write_tree(tmp_path / "in", PHOTOS)
    parts = split_source(open_source(f"tree:{tmp_path}/in", "train"), 0.3, 0)
    for part, name in zip(parts, ("own", "own_held_out"), strict=True):
        convert(part, tmp_path / f"{name}.beton", progress=False)
    found = survey(f"{tmp_path}/own.beton")
    assert (found.test, found.images + found.test_images) == (f"{tmp_path}/own_held_out.beton", 12)
