"""What both training and evaluating a recipe are made of: its images, its method, its loader."""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from kilobatch.data.beton import Info, verify
from kilobatch.data.cpus import spare_threads
from kilobatch.data.loading.loader import Loader
from kilobatch.data.sources.convert import prepare
from kilobatch.data.views.options import Views
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.worker import pretrained as trained
from kilobatch.launch.worker.process_group import World
from kilobatch.methods.method import Method

prepared = cache(prepare)  # the launcher has converted already: this finds and checks, once for each


def images_of(chosen: Recipe) -> Info:
    """What the training images are."""
    return verify(prepared(chosen.data.train, "train"))


def method_of(chosen: Recipe) -> Method:
    """As the run's seed initialises it: the same on every rank."""
    torch.manual_seed(chosen.run.seed)
    images = images_of(chosen)
    return trained.build(chosen, images.samples, len(images.classes))


def loader_of(
    chosen: Recipe,
    here: World,
    views: Views,
    batch: int,
    jigsaw: bool = False,
    some: NDArray[np.int64] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Loader:
    """The training images, augmented. some: those that have labels; None: all."""
    return Loader(
        prepared(chosen.data.train, "train"),
        views,
        batch=batch,
        rank=here.rank,
        world=here.size,
        seed=chosen.run.seed,
        threads=threads_of(chosen, here),
        device=here.device,
        jigsaw=jigsaw,
        labelled=some,
        drop_unlabelled=chosen.data.unlabelled == "drop",
        dtype=dtype,
    )


def threads_of(chosen: Recipe, here: World) -> int:
    return chosen.data.threads or spare_threads(here.local_size)
