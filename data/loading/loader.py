"""Batches of views for training, and of whole images for evaluation."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kilobatch.data.augment.jigsaw import jigsaw
from kilobatch.data.batch import Batch
from kilobatch.data.counter_rng import keys
from kilobatch.data.errors import Refusal
from kilobatch.data.loading.labels import UNLABELLED
from kilobatch.data.loading.sampling import block, cut, order
from kilobatch.data.views.options import Views

if TYPE_CHECKING:
    from kilobatch.data.loading.decoders import Work
    from kilobatch.data.loading.prefetch import Beton, Stream

SMALL = 96  # pixels: below, a clean view shows the whole image; from there on its central part
CENTRAL = 224 / 256  # of the shorter side: torchvision's Resize(256), CenterCrop(224), without the detour


class Loader:
    """This rank's part of each global batch, augmented, on `device`, made ahead of its use.

    Which samples are in a batch depends on (seed, epoch, step) alone, and what a view looks like on (seed, epoch,
    sample, view) alone: neither on ranks, threads, nor on where a run was interrupted. The last, incomplete batch of an
    epoch is dropped. Batches may be held.

    batch: the global one. jigsaw: the second view of each image is cut into patches and shuffled, as
    data/augment/jigsaw.py has it. labelled: the samples that have labels, ascending (None: all); the others are left
    out with drop_unlabelled, else their label is -1. Either way Batch.index is the file's own, and so are the views
    that go by it. dtype: of the views.
    Raises Refusal if the batch does not divide over the ranks, or if there are fewer samples.
    """

    def __init__(
        self,
        beton: Path,
        views: Views,
        *,
        batch: int,
        rank: int,
        world: int,
        seed: int,
        threads: int,
        device: torch.device,
        jigsaw: bool = False,
        labelled: NDArray[np.int64] | None = None,
        drop_unlabelled: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        if batch % world:
            near = f"{batch // world * world} or {-(-batch // world) * world}" if batch > world else f"{world}"
            raise Refusal(f"global batch {batch} does not divide over {world} ranks; use {near}")
        self.views, self.device, self.seed, self.jigsaw = views, device, seed, jigsaw
        self.batch, self.rank, self.world, self.dtype = batch, rank, world, dtype
        self.beton = opened(beton, views, seed, 0, threads, device)
        self.of = labelled if drop_unlabelled else None  # what is trained on; None: all
        self.samples = self.beton.samples if self.of is None else len(self.of)
        if self.samples < batch:
            which = "samples" if self.of is None else "samples with labels"
            raise Refusal(
                f"{beton} has {self.samples:,} {which}, fewer than one global batch of {batch:,}; "
                f"set data.batch to at most {self.samples // world * world}, or use more images"
            )
        self.hidden: Tensor | None = None  # (samples of the file,) bool, whose label is not to be seen
        if labelled is not None and not drop_unlabelled:
            self.hidden = torch.ones(self.beton.samples, dtype=torch.bool)
            self.hidden[torch.from_numpy(labelled)] = False
            self.hidden = self.hidden.to(device)
        self.steps_per_epoch = self.samples // batch
        self.stream: Stream | None = None
        self.next: tuple[int, int] | None = None  # epoch and step of the batch that the stream gives next

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `first_step` on.

        The one after the epoch's last is being made already when that is taken: going on with the next epoch costs no
        wait, going anywhere else starts anew. One epoch at a time: a call ends the iterator of an earlier one.
        """
        stream = self.stream
        if stream is None or self.next != (epoch, first_step):
            self.close()
            stream = self.open(epoch, first_step)
        return self.steps(stream, epoch, first_step)

    def open(self, epoch: int, first_step: int) -> "Stream":
        from kilobatch.data.loading.prefetch import Stream

        self.stream = Stream(self.beton, self.works(epoch, first_step))
        self.next = (epoch, first_step)
        return self.stream

    def works(self, epoch: int, first_step: int) -> Iterator["Work"]:
        """All that is to be made from there on, without an end."""
        from kilobatch.data.loading.decoders import Work

        for e in count(epoch):
            rows = cut(order(self.seed, e, self.samples), self.batch, self.rank, self.world)
            for step in range(first_step, len(rows)):
                yield Work(e, step, rows[step] if self.of is None else self.of[rows[step]])
            first_step = 0

    def steps(self, stream: "Stream", epoch: int, first_step: int) -> Iterator[Batch]:
        for step in range(first_step, self.steps_per_epoch):
            if stream is not self.stream or self.next != (epoch, step):
                raise RuntimeError(f"epoch {epoch} of this loader has been left for another")
            views, label, index, work = next(stream)
            assert (work.epoch, work.step) == (epoch, step)
            last = step + 1 == self.steps_per_epoch
            self.next = (epoch + 1, 0) if last else (epoch, step + 1)
            views = finished(views, work.index, self.views, self.seed, epoch, self.dtype)
            if self.jigsaw:
                names = keys(self.seed, epoch, torch.from_numpy(work.index), 2)[:, 1]
                views = torch.stack([views[:, 0], jigsaw(views[:, 1], names)], 1)
            if self.hidden is not None:
                label = label.masked_fill(self.hidden[index], UNLABELLED)
            yield Batch(views, index, label)

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream = self.next = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PlainLoader:
    """This rank's contiguous block of the data set, in order, nothing dropped: one clean view of each image.

    From 96 pixels on, that is the central square of 224/256 of the shorter side; below, the whole image. Views are
    (N, 1, 3, size, size), normalised; batch: of this rank, the last one smaller. An epoch may be left early.
    """

    def __init__(
        self,
        beton: Path,
        size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        *,
        batch: int,
        rank: int,
        world: int,
        threads: int,
        device: torch.device,
    ):
        self.views = Views(
            count=1, size=size, crop=None, flip=0, jitter=None, grey=0, blur=None, solarize=None, mean=mean, std=std
        )
        self.beton = opened(beton, self.views, 0, CENTRAL if size >= SMALL else 0, threads, device)
        self.samples = self.beton.samples
        self.index = block(self.samples, rank, world)
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        from kilobatch.data.loading.decoders import Work
        from kilobatch.data.loading.prefetch import Stream

        starts = range(0, len(self.index), self.batch)
        works = (Work(0, step, self.index[start : start + self.batch]) for step, start in enumerate(starts))
        stream = Stream(self.beton, works)
        try:
            for views, label, index, work in stream:
                yield Batch(finished(views, work.index, self.views, 0, 0), index, label)
        finally:
            stream.close()


def opened(path: Path, views: Views, seed: int, central: float, threads: int, device: torch.device) -> "Beton":
    """Imports FFCV, which takes seconds, only here, as this file is read for its options too."""
    from kilobatch.data.loading.decoders import CutViews
    from kilobatch.data.loading.prefetch import Beton

    return Beton(path, CutViews(path, views, seed, central, threads, device), device)


def finished(
    views: Tensor,
    index: NDArray[np.int64],
    options: Views,
    seed: int,
    epoch: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """On a CPU views arrive finished; on an accelerator what is left to do is done there, with keys on the host."""
    if views.dtype == torch.float32:
        return views.to(dtype)
    from kilobatch.data.augment.device import augment

    return augment(views, keys(seed, epoch, torch.from_numpy(index), options.count), options, dtype)
