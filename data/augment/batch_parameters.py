"""Parts that the batched forms of augmentation share: images that an operation applies to, and blur kernels."""

import torch
from torch import Tensor

from kilobatch.data.augment.cpu.blur import REACH


def affected_rows(values: Tensor, operation: int) -> Tensor:
    """Rows of the images that an operation is done to. values: (M, VALUES); operation: its column there."""
    return (values[:, operation] > 0).nonzero().flatten()


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.index_select(0, rows.to(x.device, non_blocking=True))


def put_rows(x: Tensor, rows: Tensor, part: Tensor) -> None:
    x.index_copy_(0, rows.to(x.device, non_blocking=True), part)


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """(M,) numbers on the host -> (M, 1, 1, 1) of the images' device and dtype."""
    return values.to(like.dtype).to(like.device, non_blocking=True)[:, None, None, None]


def taps(sigma: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Blur kernels of M images from sigma (M,) and radius (M,), pixels; as cpu/blur.py's taps.

    Returns weights (M, 1 + the largest reach), of the middle tap and those to one side, and each image's reach (M,).
    """
    reach = torch.minimum(radius, torch.ceil(REACH * sigma))
    distance = torch.arange(int(reach.max()) + 1)
    weights = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2) * (distance <= reach[:, None])
    return weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1]), reach
