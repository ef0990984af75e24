"""Views per second of processor time on one thread: of this project's loader, FFCV's own, torchvision and lightly.

    python -m benchmarks.loader

All of them read the same generated photographs (trainer/bench/synthetic_jpegs.py) and make two 224-pixel views of each.
The loaders take turns, and the median turn counts, because the images' random operations differ in cost. Processor time
is measured, because other work on the machine hardly affects it. FFCV's own pipeline and this loader read the .beton
through FFCV; torchvision and lightly decode the same JPEG bytes with Pillow, once for both views. The limit for all of
them is decoding alone, once for two views.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightly.transforms.simclr_transform import SimCLRTransform  # pyright: ignore[reportMissingImports]
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision import transforms

from kilobatch.data.loading.decoders import BatchRequest, ViewDecoder
from kilobatch.data.loading.prefetch import OpenBeton, Prefetcher
from kilobatch.data.views.options import Views
from kilobatch.trainer.bench.synthetic_jpegs import jpeg, write_beton

PHOTOS = 64
BATCH = 16
TURNS = 7
TURN_SECONDS = 0.5
VIEWS = Views()  # SimCLR's
CPU = torch.device("cpu")


def main() -> None:
    torch.set_num_threads(1)
    photos = [jpeg(i) for i in range(PHOTOS)]
    with tempfile.TemporaryDirectory() as folder:
        beton = Path(folder, "photos.beton")
        write_beton(beton, photos)
        loaders = {
            "kilobatch, decode and crop": ours(beton, VIEWS.model_copy(update={"flip": 0}), planar=False),
            "FFCV, decode and crop": ffcv(beton, flip=False),
            "kilobatch, decode, crop and flip": ours(beton, VIEWS, planar=False),
            "FFCV, decode, crop and flip": ffcv(beton, flip=True),
            "kilobatch, all operations": ours(beton, VIEWS, planar=True),
            "lightly, all operations": pillow(photos, SimCLRTransform(input_size=VIEWS.size)),
            "torchvision, all operations": pillow(photos, twice(torchvision())),
            "libjpeg-turbo, decode alone": lambda: [Image.open(io.BytesIO(data)).load() for data in photos],
        }
        for epoch in loaders.values():
            epoch()  # compiles, fills caches
        turns: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(TURNS):
            for name, epoch in loaders.items():
                turns[name].append(rate(epoch))
    show(turns)


def rate(epoch: Callable[[], None]) -> float:
    """Views per second of processor time."""
    views, start = 0, time.process_time()
    while (elapsed := time.process_time() - start) < TURN_SECONDS:
        epoch()
        views += 2 * PHOTOS
    return views / elapsed


def ours(beton: Path, views: Views, planar: bool) -> Callable[[], None]:
    """planar: with all operations, as on a CPU; else with those that come before an accelerator's."""
    images = ViewDecoder(beton, views, seed=0, central=0, threads=1, device=CPU)
    images.planar = planar
    opened = OpenBeton(beton, images, CPU)
    batches = np.arange(PHOTOS).reshape(-1, BATCH)

    epochs = count()

    def epoch() -> None:
        number = next(epochs)
        for _ in Prefetcher(opened, (BatchRequest(number, step, index) for step, index in enumerate(batches))):
            pass

    return epoch


def ffcv(beton: Path, flip: bool) -> Callable[[], None]:
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    def views() -> Any:
        decoder = RandomResizedCropRGBImageDecoder((VIEWS.size, VIEWS.size))
        flips = [RandomHorizontalFlip(VIEWS.flip)] if flip else []
        return PipelineSpec("image", decoder=decoder, transforms=[*flips, ToTensor()])

    loader = Loader(str(beton), BATCH, num_workers=1, pipelines={"image": views(), "second": views()})

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


def pillow(photos: list[bytes], transform: Callable[[Image.Image], Any]) -> Callable[[], None]:
    def epoch() -> None:
        for start in range(0, PHOTOS, BATCH):
            batch = [transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in photos[start : start + BATCH]]
            for view in zip(*batch, strict=True):
                torch.stack(view)

    return epoch


def torchvision() -> transforms.Compose:
    jitter, blur = VIEWS.jitter, VIEWS.blur
    assert jitter and blur
    colours = transforms.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(VIEWS.size),
            transforms.RandomHorizontalFlip(VIEWS.flip),
            transforms.RandomApply([colours], jitter.probability),
            transforms.RandomGrayscale(VIEWS.grey),
            transforms.RandomApply([transforms.GaussianBlur(VIEWS.blur_kernel, blur.sigma)], blur.probability),
            transforms.ToTensor(),
            transforms.Normalize(VIEWS.mean, VIEWS.std),
        ]
    )


def twice(transform: Callable[[Image.Image], Any]) -> Callable[[Image.Image], list[Any]]:
    return lambda image: [transform(image), transform(image)]


def show(turns: dict[str, list[float]]) -> None:
    median = {name: statistics.median(rates) for name, rates in turns.items()}
    table = Table("", "views/s", "lowest", "highest", "ours to theirs")
    for name, rates in turns.items():
        who, what = name.split(", ", 1)
        mine = median.get(f"kilobatch, {what}")
        ratio = "" if who == "kilobatch" or mine is None else f"{mine / median[name]:.2f}"
        table.add_row(name, f"{median[name]:,.0f}", f"{min(rates):,.0f}", f"{max(rates):,.0f}", ratio)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
