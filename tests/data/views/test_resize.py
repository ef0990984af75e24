"""Parts of images resized: compared with Pillow, which cuts the part out first."""

from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from kilobatch.data.counter_rng import key
from kilobatch.data.loading.decode_crop import crop_view
from kilobatch.data.numba_jit import Bytes
from kilobatch.data.views import vector_instructions
from kilobatch.data.views.columns import BICUBIC, BILINEAR
from kilobatch.data.views.filter_taps import EXACT, MIXED, WEIGHED, kind_of_sums
from kilobatch.data.views.options import Views
from kilobatch.data.views.pixel_vectors import (
    filter_pixels,
    filter_rows,
    mix_pixels,
    mix_rows,
    weigh_pixels,
    weigh_rows,
)
from kilobatch.data.views.resize import Box, make_scratch, resize
from tests.helpers.guarded_memory import guarded

PILLOWS = {BILINEAR: Image.Resampling.BILINEAR, BICUBIC: Image.Resampling.BICUBIC}
SIDES = (1, 2, 3, 5, 6, 7, 16, 33, 100, 257, 700)


def resized(image: Bytes, box: Box, size: int, interpolation: int, flip: bool = False) -> Bytes:
    out = np.zeros((size, size, 3), np.uint8)
    resize(image, box, flip, interpolation, out, make_scratch(image.shape[0], image.shape[1], size, interpolation))
    return out


def pillows(image: Bytes, box: Box, size: int, interpolation: int) -> Bytes:
    top, left, rows, columns = map(int, box)
    part = Image.fromarray(image).crop((left, top, left + columns, top + rows))
    return np.asarray(part.resize((size, size), PILLOWS[interpolation]))


def apart(ours: Bytes, theirs: Bytes) -> NDArray[np.int64]:
    return np.abs(ours.astype(np.int64) - theirs)


def noise(rng: np.random.Generator, height: int, width: int) -> Bytes:
    """Values from 0 to 255, or these two alone, which bicubic sums leave the furthest."""
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    return image if rng.random() < 0.5 else np.where(image < 128, 0, 255).astype(np.uint8)


def part_of(rng: np.random.Generator, height: int, width: int) -> Box:
    """Any part, with every side equally often; half of them reach the image's last byte."""
    rows, columns = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
    if rng.random() < 0.5:
        return height - rows, width - columns, rows, columns
    return int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1)), rows, columns


@pytest.mark.parametrize("interpolation", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("height", SIDES)
def test_any_part_of_any_image_is_as_pillow_resizes_it(interpolation: int, height: int):
    rng = np.random.default_rng(height)
    for width in SIDES:
        for _ in range(4):
            image, size = guarded(noise(rng, height, width)), int(rng.integers(8, 130))
            box = part_of(rng, height, width)
            ours, theirs = resized(image, box, size, interpolation), pillows(image, box, size, interpolation)
            exact = kind_of_sums(*box[2:], size, interpolation) == EXACT
            assert apart(ours, theirs).max() <= (0 if exact else 1), (width, box, size)


@pytest.mark.parametrize("interpolation", [BILINEAR, BICUBIC])
def test_sums_of_few_pixels_are_hardly_ever_off(interpolation: int):
    """Where Pillow's are not: a view's pixel is 1 off only if its exact value is close to a half."""
    rng = np.random.default_rng(6)
    for box, kind in (((0, 0, 50, 60), MIXED), ((5, 3, 90, 100), WEIGHED), ((0, 0, 100, 40), WEIGHED)):
        image = noise(rng, 100, 110)
        kind = WEIGHED if interpolation == BICUBIC else kind
        assert kind_of_sums(*box[2:], 64, interpolation) == kind
        off = apart(resized(image, box, 64, interpolation), pillows(image, box, 64, interpolation))
        assert (off > 0).mean() < 0.2 and off.max() <= 1


@pytest.mark.parametrize("interpolation", [BILINEAR, BICUBIC])
def test_a_part_of_the_views_size_is_copied(interpolation: int):
    image = noise(np.random.default_rng(0), 50, 60)
    assert (resized(image, (3, 5, 40, 40), 40, interpolation) == image[3:43, 5:45]).all()


@pytest.mark.parametrize("interpolation", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("size", [8, 13, 32, 65])
def test_an_even_area_keeps_its_colour(interpolation: int, size: int):
    image = np.empty((40, 30, 3), np.uint8)
    image[:] = 0, 131, 255
    for box in ((0, 0, 40, 30), (7, 2, 5, 21), (39, 29, 1, 1)):
        assert (resized(image, box, size, interpolation) == image[0, 0]).all()


@pytest.mark.parametrize("interpolation", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("columns", [3, 20, 33, 90])
def test_a_flipped_part_is_the_part_from_right_to_left(interpolation: int, columns: int):
    image = noise(np.random.default_rng(1), 70, 90)
    box = (5, 90 - columns, 60, columns)
    straight, flipped = (resized(image, box, 33, interpolation, flip) for flip in (False, True))
    assert (flipped == straight[:, ::-1]).all()


@pytest.mark.parametrize("interpolation", [BILINEAR, BICUBIC])
def test_pixels_outside_the_part_have_no_influence(interpolation: int):
    rng = np.random.default_rng(2)
    for _ in range(60):
        height, width = (int(side) for side in rng.integers(1, 60, 2))
        image, box, size = noise(rng, height, width), part_of(rng, height, width), int(rng.integers(8, 70))
        top, left, rows, columns = box
        other = ~image
        other[top : top + rows, left : left + columns] = image[top : top + rows, left : left + columns]
        assert (resized(image, box, size, interpolation) == resized(other, box, size, interpolation)).all(), box


@pytest.mark.parametrize("interpolation", [BILINEAR, BICUBIC])
def test_scratch_of_the_largest_image_serves_all_smaller_ones(interpolation: int):
    """Whatever is left in it by others, and without a byte written outside the result."""
    rng = np.random.default_rng(3)
    size, scratch = 24, make_scratch(90, 80, 24, interpolation)
    for _ in range(40):
        height, width = int(rng.integers(1, 91)), int(rng.integers(1, 81))
        image, box = noise(rng, height, width), part_of(rng, height, width)
        between = np.full(3 * size * size + 64, 77, np.uint8)
        resize(image, box, False, interpolation, between[32:-32].reshape(size, size, 3), scratch)
        assert (between[:32] == 77).all() and (between[-32:] == 77).all()
        expected = resized(image, box, size, interpolation)
        assert (between[32:-32].reshape(size, size, 3) == expected).all()
        for array in scratch:
            array.view(np.uint8)[:] = rng.integers(0, 256)


def test_twice_as_large_is_between_neighbours_and_not_the_nearest():
    """A ramp: OpenCV's INTER_AREA repeats its pixels."""
    image = np.tile(np.array([0, 80, 160, 240] * 2, np.uint8)[:, None], (8, 1, 3))
    made = np.zeros((16, 16, 3), np.uint8)
    crop_view(image, np.uint64(0), Views().plan(), 1.0, made)
    assert made[5, :8, 1].tolist() == [0, 20, 60, 100, 140, 180, 220, 180]


def test_a_view_is_the_part_that_its_key_draws():
    image, out, plan = noise(np.random.default_rng(5), 60, 80), np.zeros((24, 24, 3), np.uint8), Views().plan()
    views = []
    for i in range(8):
        crop_view(image, np.uint64(key(1, 2, i, 0)), plan, 0.0, out)
        views.append(out.copy())
    assert len({view.tobytes() for view in views}) == 8


def test_processors_without_these_instructions_have_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(4)
    source = rng.integers(0, 256, 4096, np.uint8)
    weights = rng.integers(-(2**13), 2**13, 128).astype(np.int16)
    picks = np.stack([rng.integers(0, 13, 16), np.full(16, vector_instructions.NOTHING)], axis=1).astype(np.uint8)
    places = np.array([0, 6, 15, 30])

    def run() -> list[NDArray[np.uint8]]:
        def one(out: Bytes, lines: Any) -> None:
            to, at = np.int64(out.ctypes.data), source_address
            by, there, rows = weights_address, places_address, np.int64(lines.ctypes.data)
            mix_rows(to, at, at + 100, np.int16(12345))
            mix_pixels(to + 64, at, there, picks_address, by)
            filter_rows(to + 128, rows, 3, by, 3)
            filter_pixels(to + 192, at, there, by, 3)
            weigh_rows(to + 256, rows, 6, by, 5)
            weigh_pixels(to + 320, at, there, by, 2)

        source_address, weights_address = source.ctypes.data, weights.ctypes.data
        places_address, picks_address = places.ctypes.data, picks.ctypes.data
        out = np.zeros(384, np.uint8)
        numba.njit(one)(out, source.ctypes.data + np.arange(6) * 64)
        return [part[:12] for part in out.reshape(6, 64)]

    ours = run()
    for smaller in (True, False):  # half as wide, and none
        for name in ("PICK", "SCALE", "ADD_PRODUCTS"):
            names = {kind: {16: of[16]} if smaller else {} for kind, of in getattr(vector_instructions, name).items()}
            monkeypatch.setattr(vector_instructions, name, names)
        assert all((a == b).all() for a, b in zip(ours, run(), strict=True))
    assert all(len(set(part.tolist())) > 2 for part in ours)
