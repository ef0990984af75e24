"""JPEG files cut down to rows: what is left decodes to the bits of the whole, and damaged files are left whole."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kilobatch.data.beton_writer import write_samples
from kilobatch.data.loading.decoders import ViewDecoder
from kilobatch.data.loading.ffcv_bindings import keep_torch_threads
from kilobatch.data.loading.image_table import JPEG
from kilobatch.data.loading.jpeg_rows import Cut, cut_rows
from kilobatch.data.numba_jit import Bytes
from kilobatch.data.views.options import Crop, Views
from tests.helpers.guarded_memory import guarded
from tests.helpers.loaders import CPU, PLAIN, loader, photo

with keep_torch_threads():
    from ffcv.libffcv import imdecode

SIDES = (1, 8, 15, 16, 17, 33, 50, 97, 130)


def encoded(image: Image.Image, **options: Any) -> Bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, "restart_marker_rows": 1, **options})
    return np.frombuffer(file.getvalue(), np.uint8)


def decoded(data: Bytes, height: int, width: int) -> Bytes:
    pixels = np.zeros((height, width, 3), np.uint8)
    assert imdecode(data, pixels, height, width, height, width) == 0
    return pixels


def cut(data: Bytes, height: int, width: int, top: int, end: int) -> tuple[Cut, Bytes]:
    to = np.zeros(len(data), np.uint8)
    made = cut_rows(data, height, width, top, end, to)
    return made, to[: made.size]


@pytest.mark.parametrize("mode", ["4:4:4", "4:2:2", "4:2:0", "grey"])
def test_the_rows_of_a_part_are_those_of_the_whole(mode: str):
    rng, cuts = np.random.default_rng(0), 0
    for height in SIDES:
        for width in SIDES:
            noisy = rng.integers(0, 256, (height, width, 3), np.uint8)
            image = Image.blend(Image.fromarray(noisy), photo(height, width, height), 0.7)
            data = encoded(image.convert("L")) if mode == "grey" else encoded(image, subsampling=mode)
            whole = decoded(data, height, width)
            for _ in range(4):
                top = int(rng.integers(height))
                end = int(rng.integers(top + 1, height + 1))
                made, part = cut(data, height, width, top, end)
                if made.size > 0:
                    rows = decoded(part, int(made.rows), width)[top - made.first :][: end - top]
                    assert made.first <= top and (rows == whole[top:end]).all(), (height, width, top, end)
                    cuts += 1
    assert cuts > 100


def test_only_the_rows_of_blocks_around_a_part_are_left():
    """4:2:0: a row of blocks has 16 rows of pixels, and the first and the last of these need one more."""
    data = encoded(photo(0, 70, 100), subsampling="4:2:0", comment=b"nobody reads this", exif=b"Exif\0\0" + bytes(500))
    expected = {
        (40, 41): (32, 16),
        (33, 47): (32, 16),
        (32, 33): (16, 32),
        (47, 48): (32, 32),
        (0, 15): (0, 16),
        (97, 100): (96, 4),
        (99, 100): (96, 4),
        (96, 100): (80, 20),
        (16, 17): (0, 32),
    }
    for (top, end), (first, rows) in expected.items():
        made, part = cut(data, 100, 70, top, end)
        assert (made.first, made.rows) == (first, rows)
        assert made.size < len(data) - 500 and Image.open(io.BytesIO(part.tobytes())).size == (70, rows)
    assert cut(data, 100, 70, 15, 96)[0].size == 0  # all rows of blocks


@pytest.mark.parametrize(
    "options",
    [{"restart_marker_rows": 0}, {"restart_marker_rows": 2}, {"restart_marker_blocks": 1}, {"progressive": True}],
)
def test_other_files_are_left_whole(options: dict[str, Any]):
    if "restart_marker_blocks" in options:
        options["restart_marker_rows"] = 0
    data = encoded(photo(0, 70, 100), **options)
    assert cut(data, 100, 70, 40, 41)[0] == (0, 0, 100)


def test_files_of_another_size_than_was_noted_are_left_whole():
    data = encoded(photo(0, 70, 100))
    assert cut(data, 100, 70, 40, 41)[0].size > 0
    for height, width in ((99, 70), (100, 71), (70, 100)):
        assert cut(data, height, width, 40, 41)[0].size == 0


def test_a_grey_files_sampling_factors_do_not_make_its_blocks_larger():
    data = encoded(photo(0, 8, 100).convert("L")).copy()
    frame = data.tobytes().index(b"\xff\xc0")
    assert data[frame + 9] == 1 and data[frame + 11] == 0x11
    data[frame + 11] = 0x22
    assert decoded(data, 100, 8).std() > 5
    assert cut(data, 100, 8, 40, 41)[0].size == 0


def test_nothing_is_read_behind_a_damaged_file_nor_written_behind_the_copy():
    """Random bytes, in half of the files in the header; every third file is cut off."""
    rng, whole = np.random.default_rng(1), encoded(photo(0, 70, 100))
    fates = {False: 0, True: 0}
    for i in range(3000):
        data = whole[: rng.integers(len(whole))] if i % 3 == 0 else whole
        data = guarded(data)
        place = rng.integers(0, max(1, min(len(data), 650 if i % 2 else len(data))), 3)
        if len(data) > 0:
            data[place] = rng.choice([0, 255, 0xC0, 0xD9, *rng.integers(0, 256, 4)], 3)
        top = int(rng.integers(100))
        to = np.full(len(data) + 64, 77, np.uint8)
        made = cut_rows(data, 100, 70, top, int(rng.integers(top + 1, 101)), to[: len(data)])
        assert (to[len(data) :] == 77).all() and 0 <= made.size <= len(data)
        fates[bool(made.size > 0)] += 1
    assert min(fates.values()) > 300


@pytest.mark.parametrize("count", [1, 2, 5])
def test_views_of_a_file_that_is_decoded_by_rows_are_those_of_the_whole(count: int, tmp_path: Path):
    beton, sides = tmp_path / "marked.beton", [(97 + 13 * i % 60, 90 + 31 * i % 70) for i in range(24)]
    files = [encoded(photo(i, *side)) for i, side in enumerate(sides)]
    write_samples(beton, [(JPEG, *side, file.tobytes(), 0) for side, file in zip(sides, files, strict=True)], ["a"])
    views = Views(count=count, size=32, **{**PLAIN, "crop": Crop(scale=(0.02, 0.3)), "flip": 0.5})
    with loader(beton, views) as one:
        next(one.epoch(0))
        table = one.beton.images.table
    assert table is not None and len(table.checksum) == len(sides)
    made = []
    for some in (table, table._replace(checksum=np.empty(0, np.uint32))):
        images = ViewDecoder(beton, views, 5, 0, 1, CPU)
        out, failed = np.zeros(24 * count * 32 * 32 * 3, np.uint8), np.zeros(24, np.uint8)
        images.make_views(some, 3, np.arange(24), np.arange(24), out, failed)
        assert not failed.any()
        made.append(out)
    assert (made[0] == made[1]).all() and made[0].std() > 10
