"""Loaders: batches of augmented views for training, and of unaugmented images for evaluation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kilobatch.data.augment.jigsaw import augment_by_patch, jigsaw
from kilobatch.data.batch import Batch
from kilobatch.data.errors import UserError
from kilobatch.data.loading.labels import UNLABELLED
from kilobatch.data.loading.options import OrderOptions
from kilobatch.data.loading.sampling import Sampler, rank_batches, rank_block
from kilobatch.data.tensor_rng import keys, sample_keys
from kilobatch.data.views.groups import ViewGroups, groups_of
from kilobatch.data.views.options import Interpolation, Views

if TYPE_CHECKING:
    from kilobatch.data.loading.decoders import BatchRequest
    from kilobatch.data.loading.prefetch import OpenBeton, Prefetcher

CENTRAL_FROM = 96  # pixels: from this size on an unaugmented view shows the image's central part, below it all of it
CENTRAL = 224 / 256  # of the shorter side: torchvision's Resize(256) and CenterCrop(224) in one step


def central_fraction(size: int) -> float:
    """The side of the central square that an unaugmented view of `size` pixels shows, of the image's shorter side; 0:
    it shows the whole image, whatever its shape."""
    return CENTRAL if size >= CENTRAL_FROM else 0


def input_images(views: ViewGroups) -> dict[str, Any]:
    """How an image is prepared for a trained encoder, without augmentation: as PlainLoader does, for the first group.

    size: pixels of both sides; mean, std: of values from 0 to 1; central_fraction: as central_fraction() has it;
    interpolation: Pillow's, with antialiasing.
    """
    first = groups_of(views)[0]
    values = {"size": first.size, "mean": list(first.mean), "std": list(first.std)}
    return {**values, "central_fraction": central_fraction(first.size), "interpolation": first.interpolation}


def describe_input(values: Mapping[str, Any]) -> str:
    """What input_images() says, in words."""
    central, size = values["central_fraction"], values["size"]
    part = f"the central square of {central:.1%} of the shorter side" if central else "the whole image"
    normalised = f"mean {[*values['mean']]} and std {[*values['std']]} of values from 0 to 1"
    return f"{part}, resized to {size} x {size} ({values['interpolation']}, antialiased), {normalised}"


def plain_views(
    size: int, mean: tuple[float, float, float], std: tuple[float, float, float], interpolation: Interpolation
) -> Views:
    """The options of one view that nothing is done to but to resize and normalise it."""
    plain: dict[str, Any] = {"crop": None, "flip": 0, "jitter": None, "grey": 0, "blur": None, "solarize": None}
    return Views(count=1, size=size, interpolation=interpolation, mean=mean, std=std, **plain)


@dataclass(frozen=True)
class LoaderWorker:
    """The worker that a loader makes batches for: its rank in [0, world), decoding threads, and device."""

    rank: int
    world: int
    threads: int
    device: torch.device


class Loader:
    """This rank's part of each global batch: augmented views on the worker's device, made ahead of their use.

    The samples of a batch depend on (seed, epoch, step) alone, and a view on (seed, epoch, name, view) alone: neither
    on ranks or threads, nor on where a run was interrupted. A sample's name is its index, and another one where it
    comes again in an epoch. The last, incomplete batch of an epoch is dropped. A batch that is kept is not overwritten.

    views: one group of views or several, each with a tensor of its own in Batch.views. batch: the global one. jigsaw:
    the second view of each image becomes a jigsaw, see data/augment/jigsaw.py, of one group of two views; where patches
    have colours of their own, it has to be True.
    labelled: the samples that have labels, ascending (None: all); the others are left out with drop_unlabelled, else
    their label is -1. In both cases Batch.index counts all samples of the file, and views are drawn by that index.
    used: the samples that are trained on, ascending, of which `labelled` is a part (None: all). options: the recipe's
    data.order, whose long-tailed part is `used` (labels.used_samples). order: of a method: called with the epoch when
    that begins, and not before; returns its sample indices, or None for the recipe's order. fields: what is read of the
    file beside images and labels. dtype: of the views.
    Raises UserError if the batch does not divide over the ranks, or if there are fewer samples, or if data.order does
    not fit them.
    """

    def __init__(
        self,
        beton: Path,
        views: ViewGroups,
        worker: LoaderWorker,
        *,
        batch: int,
        seed: int,
        jigsaw: bool = False,
        labelled: NDArray[np.int64] | None = None,
        drop_unlabelled: bool = False,
        used: NDArray[np.int64] | None = None,
        options: OrderOptions | None = None,
        order: Callable[[int], NDArray[np.int64] | None] | None = None,
        fields: Sequence[str] = (),
        dtype: torch.dtype = torch.float32,
    ):
        world = worker.world
        if batch % world:
            near = f"{batch // world * world} or {-(-batch // world) * world}" if batch > world else f"{world}"
            raise UserError(f"global batch {batch} does not divide over {world} ranks; use {near}")
        self.groups, self.worker, self.batch, self.seed = groups_of(views), worker, batch, seed
        assert jigsaw or not self.groups[0].by_patch
        assert not jigsaw or [group.count for group in self.groups] == [2]
        self.jigsaw, self.dtype = jigsaw, dtype
        self.beton = open_beton(beton, views, seed, 0, worker, fields)
        dropping = drop_unlabelled and labelled is not None
        subset = labelled if dropping else used  # the samples that batches are made of; None: all
        self.samples = self.beton.samples if subset is None else len(subset)
        if self.samples < batch:
            which = "samples with labels" if dropping else "samples" if used is None else "samples in data.order"
            raise UserError(
                f"{beton} has {self.samples:,} {which}, fewer than one global batch of {batch:,}; "
                f"set data.batch to at most {self.samples // world * world}, or use more images"
            )
        self.hidden: Tensor | None = None  # (samples of the file,) bool: True where the label is replaced by -1
        if labelled is not None and not drop_unlabelled:
            self.hidden = torch.ones(self.beton.samples, dtype=torch.bool)
            self.hidden[torch.from_numpy(labelled)] = False
            self.hidden = self.hidden.to(worker.device)
        unlabelled = self.samples - len(labelled) if labelled is not None and not dropping else 0
        self.sampler = Sampler(beton, self.beton.samples, subset, seed, batch, options, unlabelled, order)
        self.steps_per_epoch = self.samples // batch
        self.prefetcher: Prefetcher | None = None
        self.next: tuple[int, int] | None = None  # epoch and step of the batch that the prefetcher gives next

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `first_step` on.

        When the last batch is taken, the next epoch's first is being made already, unless a method orders the epochs:
        going on with that epoch costs no wait, any other epoch or step starts anew. There is one epoch at a time: a
        call ends an earlier iterator.
        """
        prefetcher = self.prefetcher
        if prefetcher is None or self.next != (epoch, first_step):
            self.close()
            prefetcher = self.start_prefetcher(epoch, first_step)
        return self.batches(prefetcher, epoch, first_step)

    def start_prefetcher(self, epoch: int, first_step: int) -> "Prefetcher":
        from kilobatch.data.loading.prefetch import Prefetcher

        # A method's order is asked for now and by this thread: it may read what the method has just learned.
        begun = None if self.sampler.order is None else self.sampler.epoch(epoch)
        self.prefetcher = Prefetcher(self.beton, self.requests(epoch, first_step, begun))
        self.next = (epoch, first_step)
        return self.prefetcher

    def requests(
        self, epoch: int, first_step: int, begun: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    ) -> Iterator["BatchRequest"]:
        """The batches to make from there on: of this epoch and all that follow, without an end; or of the epoch alone
        whose samples and names are `begun`."""
        from kilobatch.data.loading.decoders import BatchRequest

        part = self.batch, self.worker.rank, self.worker.world
        for e in count(epoch) if begun is None else [epoch]:
            index, names = (rank_batches(order, *part) for order in begun or self.sampler.epoch(e))
            for step in range(first_step, len(index)):
                yield BatchRequest(e, step, index[step], names[step])
            first_step = 0

    def batches(self, prefetcher: "Prefetcher", epoch: int, first_step: int) -> Iterator[Batch]:
        for step in range(first_step, self.steps_per_epoch):
            if prefetcher is not self.prefetcher or self.next != (epoch, step):
                raise RuntimeError(f"epoch {epoch} of this loader has been left for another")
            made = next(prefetcher)
            names, label = made.request.names, made.label
            assert (made.request.epoch, made.request.step) == (epoch, step)
            last = step + 1 == self.steps_per_epoch
            self.next = (epoch, step + 1)
            if last:
                self.next = (epoch + 1, 0) if self.sampler.order is None else None
            views = finish_views(made.views, names, self.groups, self.seed, epoch, self.dtype)
            if self.jigsaw and not self.groups[0].by_patch:  # else it is one already
                second_keys = keys(self.seed, epoch, torch.from_numpy(names), 2)[:, 1]
                views = (torch.stack([views[0][:, 0], jigsaw(views[0][:, 1], second_keys)], 1),)
            if self.hidden is not None:
                label = label.masked_fill(self.hidden[made.index], UNLABELLED)
            step_keys = sample_keys(self.seed, epoch * self.steps_per_epoch + step, made.names)
            yield Batch(views, made.index, label, step_keys, fields=made.fields)

    def close(self) -> None:
        if self.prefetcher is not None:
            self.prefetcher.close()
        self.prefetcher = self.next = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PlainLoader:
    """This rank's contiguous block of the images, in order and complete: one unaugmented view of each.

    From a size of 96 pixels on, a view is the central square of 224/256 of the shorter side; below, the whole image.
    Views are (N, 1, 3, size, size), normalised. batch: of this rank; the last one may be smaller. used: the
    samples of the file that are images here, ascending; None: all. rows: this rank's, by their places among these;
    None: its block. fields: what is read of the file beside images and labels. An iteration may be
    left early.
    """

    def __init__(
        self,
        beton: Path,
        size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        worker: LoaderWorker,
        *,
        batch: int,
        interpolation: Interpolation = "bilinear",
        used: NDArray[np.int64] | None = None,
        rows: NDArray[np.int64] | None = None,
        fields: Sequence[str] = (),
    ):
        self.views = plain_views(size, mean, std, interpolation)
        self.beton = open_beton(beton, self.views, 0, central_fraction(size), worker, fields)
        self.samples = self.beton.samples if used is None else len(used)
        rows = rank_block(self.samples, worker.rank, worker.world) if rows is None else rows
        self.index = rows if used is None else used[rows]
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        from kilobatch.data.loading.decoders import BatchRequest
        from kilobatch.data.loading.prefetch import Prefetcher

        parts = (self.index[start : start + self.batch] for start in range(0, len(self.index), self.batch))
        prefetcher = Prefetcher(self.beton, (BatchRequest(0, step, part, part) for step, part in enumerate(parts)))
        try:
            for made in prefetcher:
                views = finish_views(made.views, made.request.names, (self.views,), 0, 0)
                yield Batch(views, made.index, made.label, sample_keys(0, 0, made.names), fields=made.fields)
        finally:
            prefetcher.close()


def open_beton(
    path: Path, views: ViewGroups, seed: int, central: float, worker: LoaderWorker, fields: Sequence[str] = ()
) -> "OpenBeton":
    """Opens a .beton; central: see ViewDecoder. FFCV is imported when this is called, since that takes seconds."""
    from kilobatch.data.loading.decoders import ViewDecoder
    from kilobatch.data.loading.prefetch import OpenBeton

    decoder = ViewDecoder(path, views, seed, central, worker.threads, worker.device)
    return OpenBeton(path, decoder, worker.device, fields)


def finish_views(
    views: tuple[Tensor, ...],
    names: NDArray[np.int64],
    groups: Sequence[Views],
    seed: int,
    epoch: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Augments views that the decoder gives as bytes, on their device, once for each group; a CPU's float32 views are
    augmented already. Views are numbered through the groups: each has a key of its own."""
    if views[0].dtype == torch.float32:
        return tuple(group.to(dtype) for group in views)
    from kilobatch.data.augment.device import augment

    counts = [options.count for options in groups]
    keys_of = keys(seed, epoch, torch.from_numpy(names), sum(counts)).split(counts, 1)
    return tuple(
        (augment_by_patch if options.by_patch else augment)(group, own, options, dtype)
        for group, own, options in zip(views, keys_of, groups, strict=True)
    )
