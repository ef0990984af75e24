"""Views per second of processor time on one thread: of this project's loader, FFCV's own, torchvision and lightly.

    python -m benchmarks.loader

All of them read the same generated photographs (trainer/bench/synthetic_jpegs.py) and make two 224-pixel views of each,
in one row a single one. The loaders take turns, and the median turn counts, because the images' random operations
differ in cost. Processor time is measured, because other work on the machine hardly affects it. FFCV's own pipeline and
this loader read the .beton through FFCV; torchvision and lightly decode the same JPEG bytes with Pillow, once for both
views. The limit for all is decoding alone, once for all views: by Pillow, and by FFCV's binding of libjpeg-turbo, which
this loader uses too and whose cosine transform is a faster one.

By rows: the files have restart markers, as conversion writes them, and only the rows that a view shows are decoded.
FFCV's filter is OpenCV's INTER_AREA, lightly's and torchvision's are bilinear.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from kilobatch.trainer.bench.synthetic_jpegs import SHAPES, jpeg, write_beton

PHOTOS = 64
BATCH = 16
TURNS = 7
TURN_SECONDS = 0.5
VIEWS = Views()  # SimCLR's
CPU = torch.device("cpu")
OURS = "kilobatch"
CROPPED, FLIPPED, ALL = "decode and crop", "decode, crop and flip", "all operations"
ONE, DECODED = "decode and crop one view", "decode alone"


@dataclass(frozen=True)
class Entry:
    """What is measured. epoch: reads all photographs once; views: of each, which it makes or would be made of it."""

    who: str
    what: str
    epoch: Callable[[], None]
    views: int = 2


def main() -> None:
    torch.set_num_threads(1)
    photos = [jpeg(i) for i in range(PHOTOS)]
    with tempfile.TemporaryDirectory() as folder:
        beton, marked = Path(folder, "photos.beton"), Path(folder, "marked.beton")
        write_beton(beton, photos)
        write_beton(marked, [jpeg(i, restarts=True) for i in range(PHOTOS)])
        entries = entries_of(beton, marked, photos)
        for entry in entries:
            entry.epoch()  # compiles, fills caches
        turns: list[list[float]] = [[] for _ in entries]
        for _ in range(TURNS):
            for entry, rates in zip(entries, turns, strict=True):
                rates.append(rate(entry))
    show(entries, turns)


def entries_of(beton: Path, marked: Path, photos: list[bytes]) -> list[Entry]:
    bicubic = VIEWS.model_copy(update={"interpolation": "bicubic"})
    forms = {"bilinear": (beton, VIEWS), "bilinear by rows": (marked, VIEWS), "bicubic": (beton, bicubic)}
    forms["bicubic by rows"] = marked, bicubic
    entries = []
    for name, (file, views) in forms.items():
        straight = views.model_copy(update={"flip": 0})
        entries += [
            Entry(f"{OURS}, {name}", CROPPED, ours(file, straight, planar=False)),
            Entry(f"{OURS}, {name}", FLIPPED, ours(file, views, planar=False)),
            Entry(f"{OURS}, {name}", ALL, ours(file, views, planar=True)),
            Entry(f"{OURS}, {name}", ONE, ours(file, straight.model_copy(update={"count": 1}), planar=False), views=1),
        ]
    files = [np.frombuffer(data, np.uint8) for data in photos]
    return [
        *sorted(entries, key=lambda entry: entry.what),
        Entry("FFCV", CROPPED, ffcv(beton, flip=False)),
        Entry("FFCV", FLIPPED, ffcv(beton, flip=True)),
        Entry("lightly", ALL, pillow(photos, SimCLRTransform(input_size=VIEWS.size))),
        Entry("torchvision", ALL, pillow(photos, twice(torchvision()))),
        Entry("Pillow", DECODED, lambda: decode_with_pillow(photos)),
        Entry("libjpeg-turbo", DECODED, lambda: decode_all(files)),
    ]


def decode_with_pillow(photos: list[bytes]) -> None:
    for data in photos:
        Image.open(io.BytesIO(data)).load()


def decode_all(files: list[np.ndarray]) -> None:
    """By the binding that the loader uses."""
    from ffcv.libffcv import imdecode

    for number, file in enumerate(files):
        width, height = SHAPES[number % len(SHAPES)]
        assert imdecode(file, np.empty((height, width, 3), np.uint8), height, width, height, width) == 0


def rate(entry: Entry) -> float:
    """Views per second of processor time."""
    views, start = 0, time.process_time()
    while (elapsed := time.process_time() - start) < TURN_SECONDS:
        entry.epoch()
        views += entry.views * PHOTOS
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
        for _ in Prefetcher(opened, (BatchRequest(number, step, index, index) for step, index in enumerate(batches))):
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


def show(entries: list[Entry], turns: list[list[float]]) -> None:
    """Prints, beside the rates, how many times as fast ours are as others that do the same, or that decode alone."""
    medians = [statistics.median(rates) for rates in turns]
    table = Table("who", "what", "views/s", "lowest", "highest", "ours to theirs")
    for entry, rates, median in zip(entries, turns, medians, strict=True):
        others = zip(entries, medians, strict=True) if entry.who.startswith(OURS) else ()
        ratios = [
            f"{median / (theirs * entry.views / other.views):.2f}x {other.who}"
            for other, theirs in others
            if not other.who.startswith(OURS) and other.what in (entry.what, DECODED)
        ]
        numbers = (f"{number:,.0f}" for number in (median, min(rates), max(rates)))
        table.add_row(entry.who, entry.what, *numbers, ", ".join(ratios))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
