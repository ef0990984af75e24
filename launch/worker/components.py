"""Builds the parts that training and evaluating a recipe share: its images, its method, its loader."""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from kilobatch.data.beton import BetonInfo, verify_beton
from kilobatch.data.cpus import spare_threads
from kilobatch.data.loading.loader import Loader, LoaderWorker
from kilobatch.data.sources.convert import prepare
from kilobatch.data.views.options import Views
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.worker import pretrained
from kilobatch.launch.worker.process_group import World
from kilobatch.methods.method import Method

prepared_beton = cache(prepare)  # the launcher has converted the sources: here each is found and checked, once


def images_of(recipe: Recipe) -> BetonInfo:
    """The description of the training images."""
    return verify_beton(prepared_beton(recipe.data.train, "train"))


def method_of(recipe: Recipe) -> Method:
    """The recipe's method, initialised by the run's seed: the same on every rank."""
    torch.manual_seed(recipe.run.seed)
    images = images_of(recipe)
    return pretrained.build_of_recipe(recipe, images.samples, len(images.classes))


def loader_of(
    recipe: Recipe,
    world: World,
    views: Views,
    batch: int,
    jigsaw: bool = False,
    labelled: NDArray[np.int64] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Loader:
    """A loader of augmented views of the training images. labelled: the images that have labels; None: all have."""
    return Loader(
        prepared_beton(recipe.data.train, "train"),
        views,
        loader_worker(recipe, world),
        batch=batch,
        seed=recipe.run.seed,
        jigsaw=jigsaw,
        labelled=labelled,
        drop_unlabelled=recipe.data.unlabelled == "drop",
        dtype=dtype,
    )


def loader_worker(recipe: Recipe, world: World) -> LoaderWorker:
    threads = recipe.data.threads or spare_threads(world.local_size)
    return LoaderWorker(world.rank, world.size, threads, world.device)
