"""Collects some images with their features, for pictures: the same sample on every rank."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from kilobatch.methods import collectives
from kilobatch.trainer.evaluate.features import Images, Represent, gather_parts
from kilobatch.trainer.evaluate.images import Triple, to_bytes
from kilobatch.trainer.ranks.heartbeat import heartbeat
from kilobatch.trainer.ranks.phase import phase

SIDE = 64  # pixels; larger images are reduced to it


@dataclass(frozen=True)
class ImageSample:
    """Images of a data set with their features, on the CPU, in the data set's order; the same on every rank.

    x: (G, D) float32 features; label: (G,) int64; image: (G, 3, side, side) uint8.
    """

    x: Tensor
    label: Tensor
    image: Tensor

    def __len__(self) -> int:
        return len(self.label)


def collect(represent: Represent, images: Images, mean: Triple, std: Triple, most: int) -> ImageSample:
    """Every n-th image of the data set, whichever rank has it, with the smallest n that gives at most `most` images.
    Of a part of the data set it is about so many."""
    stride = -(-images.samples // most)
    parts: list[tuple[Tensor, ...]] = []
    done = 0
    for batch in images:
        done += len(batch) * collectives.world_size()
        phase("images of the picture", min(done, images.samples), images.samples)
        heartbeat()
        selected = batch.index % stride == 0
        if selected.any():
            chosen = batch.rows(selected)
            part = represent(chosen), chosen.label, thumbnails(to_bytes(chosen.views[0][:, 0], mean, std))
            parts.append(tuple(column.cpu() for column in part))
    return ImageSample(*(torch.cat(column) for column in zip(*gather_parts(parts), strict=True)))


def thumbnails(images: Tensor) -> Tensor:
    """Square images (n, 3, H, W) uint8, reduced to SIDE pixels where they are larger."""
    if images.shape[-1] <= SIDE:
        return images
    return interpolate(images.float(), (SIDE, SIDE), mode="bilinear", antialias=True).round().to(torch.uint8)
