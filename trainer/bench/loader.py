"""Views per second and core of the loader, with the rate at which JPEGs can be decoded at all as its limit."""

import io
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kilobatch.data.loading.decoders import CutViews, Work
from kilobatch.data.loading.prefetch import Beton, Stream
from kilobatch.data.views.options import Views
from kilobatch.trainer.bench.rates import Row
from kilobatch.trainer.bench.synthetic_jpegs import jpeg, write_beton

PHOTOS, BATCH, SECONDS = 64, 16, 2.0


def rows(device: torch.device) -> list[Row]:
    """Two 224-pixel views of each photograph, as the device gets them: finished on a CPU, cut and flipped for a GPU."""
    photos, views = [jpeg(i) for i in range(PHOTOS)], Views()
    with tempfile.TemporaryDirectory() as folder:
        beton = Path(folder, "photos.beton")
        write_beton(beton, photos)
        ours = rate(epochs(beton, views, planar=device.type == "cpu"))
    what = "loader, all operations" if device.type == "cpu" else "loader, decode, crop and flip"
    limit = rate(lambda: [Image.open(io.BytesIO(data)).load() for data in photos])
    return [Row(what, ours, limit, "views per core", "JPEG decode alone (libjpeg-turbo, two views of each)")]


def epochs(beton: Path, views: Views, planar: bool) -> Callable[[], object]:
    """Reads all photographs once a call. planar: with all operations; else what an accelerator is sent."""
    cpu = torch.device("cpu")
    images = CutViews(beton, views, seed=0, central=0, threads=1, device=cpu)
    images.planar = planar
    opened = Beton(beton, images, cpu)
    batches, numbers = np.arange(PHOTOS).reshape(-1, BATCH), count()

    def epoch() -> None:
        number = next(numbers)
        for _ in Stream(opened, (Work(number, step, index) for step, index in enumerate(batches))):
            pass

    return epoch


def rate(epoch: Callable[[], object]) -> float:
    """Views a second of processor time, which other work on the machine changes least; the best of the epochs."""
    epoch()  # compiles
    end, found = time.perf_counter() + SECONDS, [0.0]
    while time.perf_counter() < end:
        start = time.process_time()
        epoch()
        found.append(2 * PHOTOS / (time.process_time() - start))
    return max(found)
