"""What both forms of the batched augmentation need: grey's weights, which images drew an operation, the blur's taps."""

import torch
from torch import Tensor

from kilobatch.data.augment.cpu.blur import REACH

GREY = (0.2989, 0.587, 0.114)


def chosen(drawn: Tensor, value: int) -> Tensor:
    """Which images drew this operation."""
    return (drawn[:, value] > 0).nonzero().flatten()


def taps(sigma: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """(M,), (M,) pixels -> weights (M, 1 + the farthest reach) of the middle and of the taps to one side, and each
    one's reach (M,); as blur_planar.taps."""
    reach = torch.minimum(radius, torch.ceil(REACH * sigma))
    away = torch.arange(int(reach.max()) + 1)
    weights = torch.exp(-0.5 * (away / sigma[:, None]) ** 2) * (away <= reach[:, None])
    return weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1]), reach
