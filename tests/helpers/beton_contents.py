"""Reads back what a conversion has stored, with NumPy and Pillow."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kilobatch.data.beton_layout import OWN_LAYOUT, SAMPLE


def stored_files(beton: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """Mode (0: JPEG, 1: pixels), width, height and bytes of each image of a .beton that was converted here."""
    data = beton.read_bytes()
    samples = int(np.frombuffer(data, "<u8", 1, offset=8)[0])
    for row in np.frombuffer(data, SAMPLE, samples, offset=OWN_LAYOUT.first_row):
        start, width, height = int(row["data_ptr"]), int(row["width"]), int(row["height"])
        if row["mode"] == 1:
            yield 1, width, height, data[start : start + 3 * width * height]
        else:
            end = data.index(b"\xff\xd9", start) + 2
            yield 0, width, height, data[start:end]


def stored_pixels(beton: Path) -> Iterator[NDArray[np.uint8]]:
    """Each image, (H, W, 3)."""
    for mode, width, height, data in stored_files(beton):
        if mode == 1:
            yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
        else:
            yield np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
