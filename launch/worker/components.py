"""Builds the parts that training and evaluating a recipe share: its images, its method, its loader."""

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kilobatch.data.beton import BetonInfo, verify_beton
from kilobatch.data.cpus import spare_threads
from kilobatch.data.errors import UserError
from kilobatch.data.loading.loader import Loader, LoaderWorker, PlainLoader
from kilobatch.data.loading.options import OrderOptions
from kilobatch.data.sources.specs import is_beton
from kilobatch.data.views.groups import ViewGroups
from kilobatch.launch.processes.exit_status import this_host
from kilobatch.launch.recipes import method_options
from kilobatch.launch.recipes.data import PreparedData, PreparedFile, class_counts, prepare_data, used_of
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.worker import pretrained
from kilobatch.launch.worker.process_group import World
from kilobatch.methods import collectives
from kilobatch.methods.method import DataFacts, Method
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.trainer.checkpoint.reader import Saved

CLEAN_BATCH = 256  # images of a batch of clean ones


def data_of(recipe: Recipe, world: World, given: PreparedData | None) -> PreparedData:
    """The files with the recipe's images, the same on every rank; all ranks call it together.

    given: by the launcher, to rank 0 at least; None on rank 0 where torchrun or srun has started the workers: it looks
    for the files then as a launcher does. Raises UserError where a file is not to be seen here, or is another one.
    """
    data = collectives.from_rank_0(lambda: given or prepare_data(recipe))
    _check_file(f"data.train '{recipe.data.train}'", recipe.data.train, data.train)
    if data.test is not None:
        _check_file(f"data.test '{recipe.data.test}'", str(recipe.data.test), data.test)
    return data


def _check_file(name: str, spec: str, file: PreparedFile) -> None:
    to_all = f"that all nodes see{'' if is_beton(spec) else ', by KILOBATCH_CACHE=FOLDER'}"
    if not file.beton.exists():
        raise UserError(
            f"{name}: rank 0 has {'' if is_beton(spec) else 'converted it to '}{file.beton}, which is not there on "
            f"{this_host()}; keep it in a folder {to_all}"
        )
    sha256 = verify_beton(file.beton).sha256
    if sha256 != file.sha256:
        raise UserError(
            f"{name}: {file.beton} holds other images on {this_host()} (SHA-256 {sha256[:12]}…) than where the run was "
            f"started ({file.sha256[:12]}…); keep it in one folder {to_all}"
        )


def images_of(data: PreparedData) -> BetonInfo:
    """The description of the training images."""
    return verify_beton(data.train.beton)


def method_of(
    recipe: Recipe, data: PreparedData, saved: Saved | None = None, start: Callable[[Encoder], None] | None = None
) -> Method:
    """The recipe's method, initialised by the run's seed: the same on every rank.

    start: as build_of_recipe has it. saved: a checkpoint that it is to be restored from, whose run may have had another
    number of images and classes than the data that it is evaluated on.
    """
    torch.manual_seed(recipe.run.seed)
    if saved is not None:
        return pretrained.build_of_recipe(recipe, DataFacts(saved.meta["images"], saved.meta["classes"]))
    return pretrained.build_of_recipe(recipe, facts_of(recipe, data), start)


def facts_of(recipe: Recipe, data: PreparedData) -> DataFacts:
    """The numbers of training images and classes, and of the labelled images of each class."""
    images = images_of(data)
    return DataFacts(images.samples, len(images.classes), tuple(class_counts(recipe, data).tolist()))


def loader_of(
    recipe: Recipe,
    data: PreparedData,
    world: World,
    views: ViewGroups,
    batch: int,
    jigsaw: bool = False,
    labelled: NDArray[np.int64] | None = None,
    options: OrderOptions | None = None,
    order: Callable[[int], NDArray[np.int64] | None] | None = None,
    dtype: torch.dtype = torch.float32,
    used: NDArray[np.int64] | None = None,
) -> Loader:
    """A loader of augmented views of the training images. labelled: the images that have labels; None: all have;
    options: data.order, by which an epoch is made; None: each image once; order: a method's, see Loader; used: the
    images to take; None: those that are trained on."""
    return Loader(
        data.train.beton,
        views,
        loader_worker(recipe, world),
        batch=batch,
        seed=recipe.run.seed,
        jigsaw=jigsaw,
        labelled=labelled,
        drop_unlabelled=recipe.data.unlabelled == "drop",
        used=used_of(recipe, data) if used is None else used,
        options=options,
        order=order,
        fields=fields_of(recipe, data.train.beton),
        dtype=dtype,
    )


def fields_of(recipe: Recipe, beton: Path) -> list[str]:
    """The fields that the recipe's method reads, and that a file has: those of data.train are checked before a run
    starts, other images may do without where the method represents images alone."""
    needs = method_options.declared(recipe.method.name).needs
    return [field.name for field in verify_beton(beton).fields if field.name in needs]


def refuse_missing_fields(recipe: Recipe, method: Method, where: str, beton: Path) -> None:
    """Raises UserError for images without a field, where the method represents a sample by more than its image."""
    needs = method_options.declared(recipe.method.name).needs
    missing = sorted(needs - {*fields_of(recipe, beton)})
    if missing and type(method).represent_batch is not Method.represent_batch:
        raise UserError(
            f"method {recipe.method.name} represents a sample by its {', '.join(sorted(needs))} too, and {where} has "
            f"no {', '.join(missing)}; use images with an array of that name beside them, as npz:FILE or a .beton has"
        )


def order_of(method: Method) -> Callable[[int], NDArray[np.int64] | None] | None:
    """The method's own epoch_order, for a Loader; None: it has none, and the loader may make epochs ahead."""
    if type(method).epoch_order is Method.epoch_order:
        return None

    def order(epoch: int) -> NDArray[np.int64] | None:
        found = method.epoch_order(epoch)
        order = None if found is None else found.cpu().numpy()
        _refuse_differing_orders(method, epoch, order)
        return order

    return order


def _refuse_differing_orders(method: Method, epoch: int, order: NDArray[np.int64] | None) -> None:
    """Raises ValueError, on all ranks, where the ranks' orders differ: some samples would come twice, others never."""
    number = -1 if order is None else zlib.crc32(order.astype(np.int64).tobytes())
    device = next((p.device for p in method.parameters()), torch.device("cpu"))
    highest, lowest = collectives.all_reduce_max(torch.tensor([number, -number], device=device)).tolist()
    if highest != -lowest:
        raise ValueError(
            f"{type(method).__name__}.epoch_order({epoch}) differs between ranks; make it of what all of them have "
            "alike: the seed, the epoch, and buffers that before_epoch has filled"
        )


def clean_loader(
    recipe: Recipe,
    world: World,
    beton: Path,
    *,
    batch: int = CLEAN_BATCH,
    size: int | None = None,
    used: NDArray[np.int64] | None = None,
    rows: NDArray[np.int64] | None = None,
) -> PlainLoader:
    """A loader of unaugmented images, prepared as the first group of views says. size: pixels; None: that group's;
    batch, used, rows: as PlainLoader has them."""
    views = recipe.data.groups[0]
    return PlainLoader(
        *(beton, size or views.size, views.mean, views.std, loader_worker(recipe, world)),
        batch=batch,
        interpolation=views.interpolation,
        used=used,
        rows=rows,
        fields=fields_of(recipe, beton),
    )


def loader_worker(recipe: Recipe, world: World) -> LoaderWorker:
    threads = recipe.data.threads or spare_threads(world.local_size)
    return LoaderWorker(world.rank, world.size, threads, world.device)
