"""Loaders of generated photographs, for the tests of loading."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.beton_writer import write_samples
from kilobatch.data.loading.loader import Loader, LoaderWorker, PlainLoader
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import encode
from kilobatch.data.views.groups import ViewGroups
from kilobatch.data.views.options import Affine, Solarize, Views

CPU = torch.device("cpu")
SAMPLES = 50
VIEWS = Views(size=24, affine=Affine(degrees=20, shift=0.1), solarize=Solarize())
PLAIN = {"crop": None, "flip": 0, "jitter": None, "grey": 0, "blur": None, "mean": (0, 0, 0), "std": (1, 1, 1)}


def photo(i: int, width: int, height: int) -> Image.Image:
    """An image of smooth colours, a different one for each i."""
    noise = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def write(path: Path, images: list[Image.Image]) -> Path:
    stored = [encode(image, Encoding()) for image in images]
    samples = [(image.mode, image.width, image.height, image.data, label) for label, image in enumerate(stored)]
    write_samples(path, samples, [str(label) for label in range(len(images))])
    return path


def loader(
    beton: Path, views: ViewGroups = VIEWS, *, rank: int = 0, world: int = 1, threads: int = 1, **changed: Any
) -> Loader:
    options: dict[str, Any] = {"batch": 8, "seed": 5}
    return Loader(beton, views, LoaderWorker(rank, world, threads, CPU), **{**options, **changed})


def plain(
    beton: Path, size: int = 24, *, rank: int = 0, world: int = 1, threads: int = 1, **changed: Any
) -> PlainLoader:
    worker = LoaderWorker(rank, world, threads, CPU)
    return PlainLoader(beton, size, (0, 0, 0), (1, 1, 1), worker, batch=8, **changed)


def stacked(batches: Iterator[Batch] | list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    batches = list(batches)
    return (
        torch.cat([batch.views[0] for batch in batches]),
        torch.cat([batch.index for batch in batches]),
        torch.cat([batch.label for batch in batches]),
    )


def threads_of_loaders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if type(thread).__name__ == "Prefetcher"]


@dataclass
class Epochs:
    """The batches of two epochs, as one rank with one thread gets them."""

    batches: list[list[Batch]]
