"""A few thousand images with their features, for pictures: the same on every rank."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from kilobatch.trainer.evaluate.features import Images, Represent, gather_parts
from kilobatch.trainer.evaluate.images import Triple, to_bytes
from kilobatch.trainer.ranks.heartbeat import beat

SIDE = 64  # pixels: larger images are kept reduced to this


@dataclass(frozen=True)
class Gallery:
    """x: (G, D) float32 features; label: (G,) int64; image: (G, 3, side, side) uint8. In data set order, on the CPU."""

    x: Tensor
    label: Tensor
    image: Tensor

    def __len__(self) -> int:
        return len(self.label)


def collect(represent: Represent, images: Images, mean: Triple, std: Triple, most: int) -> Gallery:
    """Every n-th image of the data set, n being the smallest that gives at most `most`: whichever ranks hold them."""
    every = -(-images.samples // most)
    parts: list[tuple[Tensor, ...]] = []
    for batch in images:
        beat()
        chosen = batch.index % every == 0
        if chosen.any():
            views, label = batch.views[chosen, 0], batch.label[chosen]
            part = represent(views), label, _thumbnails(to_bytes(views, mean, std))
            parts.append(tuple(column.cpu() for column in part))
    return Gallery(*(torch.cat(column) for column in zip(*gather_parts(parts), strict=True)))


def _thumbnails(images: Tensor) -> Tensor:
    """(n, 3, H, W) uint8, square -> at most SIDE pixels."""
    if images.shape[-1] <= SIDE:
        return images
    return interpolate(images.float(), (SIDE, SIDE), mode="bilinear", antialias=True).round().to(torch.uint8)
