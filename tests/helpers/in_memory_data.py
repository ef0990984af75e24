"""Small data sets in memory, divided over ranks as the loaders divide theirs."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kilobatch.data.batch import Batch, make_batch
from kilobatch.methods import collectives


class Block:
    """This rank's contiguous block of the data set, in batches; blocks may differ in size by one."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int = 7):
        self.samples, self.batch = len(images), batch
        self.images, self.labels = images, labels

    def __iter__(self) -> Iterator[Batch]:
        for index in (
            torch.arange(self.samples).tensor_split(collectives.world_size())[collectives.rank()].split(self.batch)
        ):
            if len(index):
                yield make_batch(self.images[index, None], index, self.labels[index])


class Shuffled:
    """This rank's part of each whole batch, in another order every epoch."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int):
        self.images, self.labels, self.batch = images, labels, batch
        self.steps_per_epoch = len(images) // batch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(epoch))
        for step in range(first_step, self.steps_per_epoch):
            index = order[step * self.batch : (step + 1) * self.batch].chunk(collectives.world_size())[
                collectives.rank()
            ]
            yield make_batch(self.images[index, None], index, self.labels[index])


def clusters(samples: int, classes: int, seed: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """(samples, 3, 8, 8) images about as many centres as there are classes, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (samples,), generator=generator)
    return centres[labels] + noise * torch.randn(samples, 3, 8, 8, generator=generator), labels


def pixels(batch: Batch) -> Tensor:
    """(N, D) features that are the pixels of the first view."""
    return flat(batch.views[0][:, 0])


def flat(images: Tensor) -> Tensor:
    return images.flatten(1)
