"""The places of a .beton's images in the mapped file, as compiled loops read them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.beton_layout import allocation_of
from kilobatch.data.crc32c import crc32c
from kilobatch.data.errors import UserError
from kilobatch.data.numba_jit import Bytes, Integer, exact
from kilobatch.data.sources.image_files import EncodedImage

JPEG, RAW = 0, 1  # RGBImageField's modes


class ImageTable(NamedTuple):
    """Places and sizes of the images. storage: (bytes,) uint8, read-only; the others: (samples,), by sample index."""

    storage: Bytes
    start: NDArray[np.int64]
    size: NDArray[np.int64]  # bytes
    height: NDArray[np.int64]
    width: NDArray[np.int64]
    mode: Bytes
    checksum: NDArray[np.uint32]  # CRC-32C of the bytes; (0,): unknown


@exact
def is_intact(table: ImageTable, sample: Integer) -> bool:
    """Whether a sample's bytes have the checksum that they were written with; True where that is unknown."""
    if len(table.checksum) == 0:
        return True
    start = table.start[sample]
    return crc32c(table.storage[start : start + table.size[sample]]) == table.checksum[sample]


def build_table(
    beton: Path, rows: np.ndarray, file: Bytes, starts: np.ndarray, sizes: np.ndarray, checksum: NDArray[np.uint32]
) -> ImageTable:
    """The images' places in the file. Raises UserError where its tables disagree, which FFCV does not check."""
    allocation = allocation_of(rows["data_ptr"], starts, sizes)
    start, size = rows["data_ptr"].astype(np.int64), np.append(sizes, 0)[allocation].astype(np.int64)
    height, width = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
    mode = np.ascontiguousarray(rows["mode"])
    inside = (allocation >= 0) & (start >= 0) & (size >= 0) & (start <= len(file)) & (size <= len(file) - start)
    plausible = (height > 0) & (width > 0) & np.where(mode == RAW, size == 3 * height * width, mode == JPEG)
    if (inside & plausible).all():
        storage = np.asarray(file)
        storage.setflags(write=False)
        return ImageTable(storage, start, size, height, width, mode, checksum)
    raise UserError(f"{beton} is damaged: its tables do not fit its {len(file):,} bytes; convert it again")


def one_image_table(pixels: Bytes, sample: int) -> ImageTable:
    """A table for an image in memory, (H, W, 3), as sample number `sample`; it has no other images."""
    return _table(np.ascontiguousarray(pixels).reshape(-1), RAW, pixels.shape[0], pixels.shape[1], sample)


def encoded_table(image: EncodedImage) -> ImageTable:
    """A table for one image in memory, as a .beton holds it."""
    return _table(np.frombuffer(image.data, np.uint8), image.mode, image.height, image.width, 0)


def _table(storage: Bytes, mode: int, height: int, width: int, sample: int) -> ImageTable:
    storage.setflags(write=False)

    def column(value: int, dtype: type = np.int64) -> np.ndarray:
        return np.full(sample + 1, value, dtype)

    return ImageTable(
        *(storage, column(0), column(storage.size), column(height), column(width), column(mode, np.uint8)),
        checksum=np.empty(0, np.uint32),
    )
