"""Shuffled BN: He et al. 2020, arxiv.org/abs/1911.05722, section 3.3."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.methods.networks.options import SHUFFLE_NEEDS_WORKERS


class Shuffle(nn.Module):
    """Applies a network to the samples of all ranks in shuffled order, and puts its outputs back in place.

    A norm over a rank's own samples gives a query and its positive key the same statistics, and the queue's keys
    others, so that an encoder can tell the positive by the statistics, without looking at the image. In a shuffled
    order a key's norm sees a random part of the global batch instead. The order is the same on all ranks, a pure
    function of the step. Images and keys are sent once each, straight to the rank that needs them.

    Raises UserError on one rank, whose norm sees the same samples in any order.
    """

    step: Tensor  # 0-dim int64

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor(0))

    @torch.no_grad()
    def forward(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x (n, ...), the same n on every rank -> network(x), each row computed on the rank that the order gives."""
        if collectives.world_size() == 1:
            raise UserError(SHUFFLE_NEEDS_WORKERS)
        order = permutation(collectives.world_size() * len(x), int(self.step))
        return collectives.exchange(network(collectives.exchange(x, order)), order.argsort())

    def advance(self) -> None:
        """Goes on to the next step's order."""
        self.step += 1


def permutation(n: int, step: int) -> Tensor:
    """(n,) int64 on the CPU: 0 to n - 1 in this step's order, the same in every process."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(step))
