"""Measures k-NN accuracies on a fixed sample of the images, to the same number on any number of ranks.

Each rank computes the features of whole batches of BATCH images, so that a network sees the same batches however many
ranks there are. Rank 0 compares all of them in fp64, without a collective. That is for small samples; knn.py compares
any number of images, to the last bits of fp32.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from kilobatch.data.errors import UserError
from kilobatch.data.loading.sampling import epoch_order, rank_block
from kilobatch.methods import collectives
from kilobatch.trainer.evaluate.features import Images, Represent, gather_parts
from kilobatch.trainer.evaluate.image_sample import thumbnails
from kilobatch.trainer.evaluate.images import Triple, to_bytes
from kilobatch.trainer.evaluate.knn import nearest_of, vote
from kilobatch.trainer.evaluate.options import KNNOptions
from kilobatch.trainer.ranks.heartbeat import heartbeat

BATCH = 128  # images of a batch
TRAIN_IMAGES, TEST_IMAGES = 2048, 512  # at most, so that a large encoder takes seconds, too
SEED = 30  # of the choice of these images; not the run's, so that all runs are compared on the same


class BaselinesFailed(Exception):
    """A rank could not compute the features; raised on all ranks, so that none waits for another."""


def most_images(k: int) -> tuple[int, int]:
    """How many training images and test images are used at most, for k neighbours."""
    return max(TRAIN_IMAGES, 4 * k), TEST_IMAGES


def rows_of_rank(images: int, most: int) -> NDArray[np.int64]:
    """The numbers of this rank's images: whole batches of a fixed choice of `most`, or of all where they are fewer."""
    rows = np.sort(epoch_order(SEED, 0, images)[:most]) if images > most else np.arange(images)
    batches = rank_block(-(-len(rows) // BATCH), collectives.rank(), collectives.world_size())
    return rows[batches[0] * BATCH : (batches[-1] + 1) * BATCH] if len(batches) else rows[:0]


def raw_pixels(mean: Triple, std: Triple) -> Represent:
    """The pixels as features, of images that were normalised with mean and std; larger images are reduced."""
    return lambda batch: thumbnails(to_bytes(batch.views[0][:, 0], mean, std)).flatten(1)


def accuracies(
    of: Mapping[str, Represent], train: Images, test: Images, options: KNNOptions, among: Sequence[int] | None
) -> dict[str, float]:
    """The top-1 accuracy of each representation; all ranks call it together.

    train, test: this rank's images, as rows_of_rank() has them. among: the classes whose votes count; None: all. With
    fewer training images than options.k, all of them vote. Raises BaselinesFailed.
    """
    parts, problem = [], ""
    try:
        parts = [_features(of, images) for images in (train, test)]
    except Exception as error:  # all ranks are told before anyone waits for the features of this one
        problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    if failed := [each for each in _of_all_ranks(problem) if each]:
        raise BaselinesFailed(" ".join(failed[0].split()))
    bank, queries = (_joined(gather_parts(part)) for part in parts)

    def compared() -> dict[str, float]:
        found: dict[str, float] = {}
        for name, x, y in zip(of, bank[1:], queries[1:], strict=True):
            found[name] = _accuracy(x, bank[0], y, queries[0], options, among)
            heartbeat()
        return found

    return collectives.from_rank_0(compared)


def _features(of: Mapping[str, Represent], images: Images) -> list[tuple[Tensor, ...]]:
    """(labels, features of each representation) of each batch, on the CPU."""
    parts: list[tuple[Tensor, ...]] = []
    for batch in images:
        parts.append((batch.label.cpu(), *(represent(batch).cpu() for represent in of.values())))
        heartbeat()
    return parts


def _joined(parts: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _accuracy(
    bank: Tensor, bank_label: Tensor, queries: Tensor, label: Tensor, options: KNNOptions, among: Sequence[int] | None
) -> float:
    """bank (m, D), queries (n, D), of any type."""
    nearest = nearest_of((_unit(queries) @ _unit(bank).T).float(), min(options.k, len(bank)))
    classes = max(int(bank_label.max()), *(among or [0])) + 1
    voted = vote(nearest.similarity, bank_label[nearest.index], classes, options.temperature, among)
    return int((voted == label).sum()) / len(label)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.double(), dim=1)


def _of_all_ranks(text: str) -> list[str]:
    if collectives.world_size() == 1:
        return [text]
    texts = [""] * collectives.world_size()
    dist.all_gather_object(texts, text)
    return texts
