"""Measures the loader's views per second and core, with the rate of decoding the same JPEGs as its limit."""

import io
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kilobatch.data.loading.decoders import BatchRequest, ViewDecoder
from kilobatch.data.loading.prefetch import OpenBeton, Prefetcher
from kilobatch.data.views.groups import ViewGroups
from kilobatch.data.views.options import Views
from kilobatch.trainer.bench.rates import BenchRow
from kilobatch.trainer.bench.synthetic_jpegs import jpeg, write_beton

PHOTOS, BATCH, SECONDS = 64, 16, 2.0


def rows(device: torch.device, groups: Sequence[Views] | None = None) -> list[BenchRow]:
    """One row: the views of each photograph, with all operations on a CPU, cropped and flipped for a GPU. groups: of
    views, as a recipe has them; None: two of 224 pixels."""
    photos, views = [jpeg(i) for i in range(PHOTOS)], groups or (Views(),)
    each = sum(group.count for group in views)
    with tempfile.TemporaryDirectory() as folder:
        beton = Path(folder, "photos.beton")
        write_beton(beton, photos)
        views_per_second = rate(epochs(beton, views, planar=device.type == "cpu"), each)
    what = "loader, all operations" if device.type == "cpu" else "loader, decode, crop and flip"
    if groups:
        what += f", {' + '.join(f'{group.count} x {group.size}' for group in groups)} pixels"
    limit = rate(lambda: [Image.open(io.BytesIO(data)).load() for data in photos], each)
    several = {1: "one view", 2: "two views"}.get(each, f"{each} views")
    return [
        BenchRow(
            what, views_per_second, limit, "views per core", f"JPEG decode alone (libjpeg-turbo, {several} of each)"
        )
    ]


def epochs(beton: Path, views: ViewGroups, planar: bool) -> Callable[[], object]:
    """A function that reads all photographs once. planar: with all operations; else those before an accelerator's."""
    cpu = torch.device("cpu")
    images = ViewDecoder(beton, views, seed=0, central=0, threads=1, device=cpu)
    images.planar = planar
    opened = OpenBeton(beton, images, cpu)
    batches, numbers = np.arange(PHOTOS).reshape(-1, BATCH), count()

    def epoch() -> None:
        number = next(numbers)
        for _ in Prefetcher(opened, (BatchRequest(number, step, index, index) for step, index in enumerate(batches))):
            pass

    return epoch


def rate(epoch: Callable[[], object], each: int) -> float:
    """Views a second of processor time, the best of several epochs. Other work on the machine hardly affects it. each:
    views of a photograph."""
    epoch()  # compiles
    end, rates = time.perf_counter() + SECONDS, [0.0]
    while time.perf_counter() < end:
        start = time.process_time()
        epoch()
        rates.append(each * PHOTOS / (time.process_time() - start))
    return max(rates)
