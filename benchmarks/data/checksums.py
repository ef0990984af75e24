"""Processor time of the samples' checksums, as a share of decoding and cropping, on one thread.

    python -m benchmarks.data.checksums

The loader's own loops make views of each image, with checksums and without: one view of the whole image, the cheapest
that there is; two crops, as for an accelerator; and two crops with all operations, as for a CPU. With and without take
turns, and the median of the turns' ratios counts.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from kilobatch.data.beton_note import sample_checksums
from kilobatch.data.beton_writer import write_samples
from kilobatch.data.crc32c import INSTRUCTION
from kilobatch.data.loading.decoders import BatchRequest, ViewDecoder
from kilobatch.data.loading.image_table import ImageTable
from kilobatch.data.loading.prefetch import OpenBeton, Prefetcher
from kilobatch.data.views.options import Views
from kilobatch.trainer.bench.synthetic_jpegs import SHAPES, jpeg

IMAGES = 256
TURNS = 25
TURN_SECONDS = 0.1
CPU = torch.device("cpu")


def main() -> None:
    photos = [jpeg(i) for i in range(32)] * (IMAGES // 32)
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), np.uint8)
    sets = {
        f"JPEGs of {sum(map(len, photos)) // IMAGES:,} bytes": (
            224,
            [(0, *SHAPES[i % len(SHAPES)], data, 0) for i, data in enumerate(photos)],
        ),
        "pixels, 32 x 32": (32, [(1, 32, 32, image.tobytes(), 0) for image in pixels]),
    }
    print(f"CRC-32C by {'the instruction ' + INSTRUCTION if INSTRUCTION else 'tables'}")
    for name, (size, samples) in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            beton = Path(folder, "images.beton")
            write_samples(beton, samples, ["a"])
            whole = Views(count=1, size=size, crop=None, flip=0, jitter=None, grey=0, blur=None)
            for what, views, planar in (
                ("whole image", whole, False),
                ("two crops", Views(size=size), False),
                ("two views with all operations", Views(size=size), True),
            ):
                with_checksums, without = measure(beton, views, planar)
                share = statistics.median(a / b for a, b in zip(with_checksums, without, strict=True)) - 1
                print(
                    f"{name}, {what}: {statistics.median(without) * 1e6:.2f} us an image without checksums, "
                    f"{statistics.median(with_checksums) * 1e6:.2f} with: {share:+.1%}"
                )


def measure(beton: Path, views: Views, planar: bool) -> tuple[list[float], list[float]]:
    """Seconds an image with checksums and without, of each turn."""
    images = ViewDecoder(beton, views, seed=0, central=0, threads=1, device=CPU)
    images.planar = planar
    table = table_of(images, beton)
    assert len(sample_checksums(images.info)) == len(table.checksum) == IMAGES
    tables = table, table._replace(checksum=np.empty(0, np.uint32))
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(TURNS):
        for one, found in zip(tables, seconds, strict=True):
            found.append(seconds_per_image(images, one))
    return seconds


def table_of(images: ViewDecoder, beton: Path) -> ImageTable:
    """The table that the decoder makes at its first batch."""
    with_one_batch = Prefetcher(OpenBeton(beton, images, CPU), iter([BatchRequest(0, 0, np.arange(1), np.arange(1))]))
    next(with_one_batch)
    with_one_batch.close()
    assert images.table is not None
    return images.table


def seconds_per_image(images: ViewDecoder, table: ImageTable) -> float:
    """Of processor time."""
    index, failed = np.arange(IMAGES), np.zeros(IMAGES, np.uint8)
    out = images.output(IMAGES).numpy()
    done, start = 0, time.process_time()
    while (elapsed := time.process_time() - start) < TURN_SECONDS:
        images.make_views(table, 0, index, index, out, failed)
        done += IMAGES
    assert not failed.any()
    return elapsed / done


if __name__ == "__main__":
    main()
