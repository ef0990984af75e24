"""Held-out parts: stable when images are added, of every class, and without an image that is in both."""

from pathlib import Path

import numpy as np
import pytest

from kilobatch.data.beton import read_labels, read_names, verify_beton
from kilobatch.data.errors import UserError
from kilobatch.data.sources.arrays import Arrays
from kilobatch.data.sources.hold_out import held_out_images, image_hashes, parse_share, split_source
from kilobatch.launch.__main__ import main
from tests.helpers.photo_sources import synthetic_photos, write_tree


class Named(Arrays):
    """Images of ten classes, named as they would be in a tree."""

    def __init__(self, images: range) -> None:
        super().__init__(np.zeros((len(images), 1, 1), np.uint8), np.array(images) % 10, [str(i) for i in range(10)])
        self.names = [f"{i % 10}/{i:07}.jpg" for i in images]


def test_no_image_changes_sides_when_others_are_added():
    def held(source: Named) -> set[str]:
        names = split_source(source, 0.05, seed=0)[1].names
        assert names is not None
        return {*names}

    small, large = Named(range(0, 20_000, 2)), Named(range(20_000))
    assert held(small) == held(large) & {*(small.names or [])}
    counts = np.bincount(split_source(large, 0.05, seed=0)[1].labels, minlength=10)
    assert (np.abs(counts - 100) < 5 * np.sqrt(100 * 0.95)).all(), counts  # of 2,000 of each class; 5 deviations
    parts = split_source(large, 0.05, seed=1)
    assert {*(parts[1].names or [])} != held(large) and len(parts[0]) + len(parts[1]) == 20_000


def test_each_class_is_in_both_parts():
    labels = np.repeat([0, 1, 2, -1], [1, 2, 5, 3])
    hashes = np.random.default_rng(0).integers(0, 2**64, len(labels), np.uint64)
    for share in (1e-9, 0.5, 1 - 1e-12):
        held = held_out_images(hashes, labels, share)
        for label, images in ((1, 2), (2, 5), (-1, 3)):
            assert 0 < held[labels == label].sum() < images, (share, label)
    assert not held_out_images(hashes, labels, 1e-9)[0]  # a class of one image has it in the first part


def test_images_without_names_go_by_their_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), np.uint8)
    pixels[30] = pixels[10]
    source = Arrays(pixels, np.zeros(50, int), ["a"])
    hashes = image_hashes(source, 0)
    assert hashes[30] == hashes[10] and len({*hashes.tolist()}) == 49
    assert (image_hashes(Arrays(pixels[::-1].copy(), np.zeros(50, int), ["a"]), 0) == hashes[::-1]).all()


def test_shares():
    assert parse_share("5%") == parse_share("0.05") == 0.05
    for text in ("5", "0", "100%", "-1%", "five", "nan"):
        with pytest.raises(UserError, match=f"--hold-out is '{text}'; give a share of the images such as 5% or 0.05"):
            parse_share(text)
    with pytest.raises(UserError, match=r"--hold-out 0.05 of 1 images leaves no image in"):
        split_source(Named(range(1)), 0.05, 0)


def test_the_command_writes_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    photos = synthetic_photos(30, side=66)
    write_tree(tmp_path / "in", photos)
    command = ["convert", f"tree:{tmp_path}/in", f"{tmp_path}/train.beton", "--hold-out", "20%", "--hold-out-seed", "3"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    betons = [tmp_path / "train.beton", tmp_path / "train_held_out.beton"]
    infos = [verify_beton(beton, full=True) for beton in betons]
    names = [read_names(beton) for beton in betons]
    assert infos[0].classes == infos[1].classes == ["ant", "bee", "cat"]
    assert sorted(names[0] + names[1]) == sorted(path for path, *_ in photos) and 3 <= len(names[1]) <= 12
    assert all(set(read_labels(beton)) == {0, 1, 2} for beton in betons)
    assert f"wrote {betons[1]}: {len(names[1])} images in 3 classes" in capsys.readouterr().out
