"""Processor time of an image with two groups of views (2 of 224 pixels and 6 of 96), to that with the first alone.

    python -m benchmarks.data.view_groups

The loader reads the same generated photographs in all forms (trainer/bench/synthetic_jpegs.py), on one thread: with all
operations, as for a CPU, and cropped and flipped, as for an accelerator. The forms take turns, and the median of the
turns' ratios counts. The second group as a data set of its own, which would be decoded once more, stands beside them.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import torch

from kilobatch.data.loading.decoders import BatchRequest, ViewDecoder
from kilobatch.data.loading.prefetch import OpenBeton, Prefetcher
from kilobatch.data.views.groups import ViewGroups
from kilobatch.data.views.options import Crop, Views
from kilobatch.trainer.bench.synthetic_jpegs import jpeg, write_beton

PHOTOS, BATCH = 64, 16
TURNS = 15
CPU = torch.device("cpu")
LARGE = Views()  # SimCLR's
SMALL = Views(count=6, size=96, crop=Crop(scale=(0.05, 0.4)))
FORMS: dict[str, ViewGroups] = {"2 x 224": LARGE, "2 x 224 + 6 x 96": (LARGE, SMALL), "6 x 96 alone": SMALL}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        beton = Path(folder, "photos.beton")
        write_beton(beton, [jpeg(i, restarts=True) for i in range(PHOTOS)])
        for what, planar in (("all operations", True), ("decode, crop and flip", False)):
            epochs = [epochs_of(beton, views, planar) for views in FORMS.values()]
            for epoch in epochs:
                epoch()  # compiles, fills caches
            turns = [[seconds(epoch) for epoch in epochs] for _ in range(TURNS)]
            for number, name in enumerate(FORMS):
                ratios = [turn[number] / turn[0] for turn in turns]
                spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                image = statistics.median(turn[number] for turn in turns) / PHOTOS
                print(f"{what}, {name}: {image * 1e3:.2f} ms an image, {statistics.median(ratios):.2f}x ({spread})")


def epochs_of(beton: Path, views: ViewGroups, planar: bool) -> Callable[[], None]:
    """A function that reads all photographs once."""
    images, numbers = ViewDecoder(beton, views, seed=0, central=0, threads=1, device=CPU), count()
    images.planar = planar
    opened, batches = OpenBeton(beton, images, CPU), np.arange(PHOTOS).reshape(-1, BATCH)

    def epoch() -> None:
        number = next(numbers)
        for _ in Prefetcher(opened, (BatchRequest(number, step, index, index) for step, index in enumerate(batches))):
            pass

    return epoch


def seconds(epoch: Callable[[], None]) -> float:
    """Of processor time, which other work on the machine hardly affects."""
    start = time.process_time()
    epoch()
    return time.process_time() - start


if __name__ == "__main__":
    main()
