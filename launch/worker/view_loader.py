"""Batches of augmented views for a training loop of one's own."""

import os
from collections.abc import Iterator
from typing import Any, Self

import torch
import torch.distributed as dist

from kilobatch.data.batch import Batch
from kilobatch.data.cpus import spare_threads
from kilobatch.data.loading.loader import Loader, LoaderWorker
from kilobatch.data.sources.convert import prepare
from kilobatch.data.sources.encoding import encoding_for_views
from kilobatch.data.views.groups import ViewGroups, groups_of, largest_side
from kilobatch.data.views.options import Views


class ViewLoader:
    """An iterable of tensors (V, n, 3, size, size): V views of each of n images, normalised, on the device.

        for one, two in ViewLoader("folder:photos", batch=256):
            loss = nt_xent(network(one), network(two))

    With a list of several groups of views it gives a tuple of such tensors, one for each group:

        for large, small in ViewLoader("folder:photos", 256, [Views(count=2), Views(count=6, size=96)]):

    Each iteration is one epoch, in another order than the one before; `epoch(k)` gives a certain one, as Batch objects
    with labels. len() is the number of batches; the last, incomplete one is left out. The images and views depend on
    (seed, epoch) alone. A source is converted to a .beton at the first use, once; see data.sources.convert.prepare.

    source: training images: a .beton, or folder:PATH, npz:PATH, digits, …; batch: over all ranks of torch.distributed's
    process group, of which each gets its part; n is batch / ranks. Make it once there is such a group. views: None:
    SimCLR's, of 224 pixels; a list: groups, each of its own size, normalised as the first. device: None: this process's
    current GPU, or the CPU where there is none.
    Raises UserError for a source that cannot be used, and for a batch that does not divide over the ranks.
    """

    def __init__(
        self,
        source: str,
        batch: int,
        views: ViewGroups | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ):
        groups = groups_of(views or Views())
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        grouped = dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # torchrun and our launcher set it
        worker = LoaderWorker(rank, world, spare_threads(sharing), torch.device(device))
        beton = prepare(source, "train", encoding_for_views(largest_side(groups)))
        self._loader = Loader(beton, groups, worker, batch=batch, seed=seed, jigsaw=groups[0].by_patch)
        self._next = 0

    def __len__(self) -> int:
        return self._loader.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        epoch, self._next = self._next, self._next + 1
        batches = self._loader.epoch(epoch)
        if len(self._loader.groups) > 1:
            return (tuple(views.transpose(0, 1) for views in batch.views) for batch in batches)
        return (batch.views[0].transpose(0, 1) for batch in batches)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on: views, of each group (n, V, 3, size, size), index, label."""
        return self._loader.epoch(epoch, first_step)

    def close(self) -> None:
        """Ends the loader's thread, which makes batches ahead."""
        self._loader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
