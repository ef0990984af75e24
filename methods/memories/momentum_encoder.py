"""The momentum encoder: an exponential moving average of the encoder."""

import copy
import math

import torch
from torch import Tensor, nn

from kilobatch.methods.networks import batch_norm


class MomentumEncoder(nn.Module):
    """A copy of `online` that follows it by an exponential moving average: MoCo, section 3.2, eq. 2.

    In training its norms use the statistics of their own batch, as the paper's do, but do not record them: its running
    statistics are those of the online network at the last follow(). Its parameters take no gradient, so that neither
    the optimizer nor the gradients' average over ranks includes them. Averages are of the fp32 parameters, whatever the
    autocast type.
    """

    def __init__(self, online: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(online).requires_grad_(False)
        for module in batch_norm.norms(self.network):
            module.counts = False

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    @torch.no_grad()
    def follow(self, online: nn.Module, momentum: float) -> None:
        """Moves the parameters 1 - momentum of the way to those of online, the network that it is a copy of, and copies
        its buffers."""
        torch._foreach_lerp_([*self.network.parameters()], [*online.parameters()], 1 - momentum)  # pyright: ignore
        if buffers := [*self.network.buffers()]:
            torch._foreach_copy_(buffers, [*online.buffers()])  # pyright: ignore[reportPrivateImportUsage]


def rising(momentum: float, progress: float) -> float:
    """A momentum that rises by half a cosine, from `momentum` at progress 0 to 1 at progress 1: MoCo v3's and BYOL's.

    Grill et al. 2020, arxiv.org/abs/2006.07733, section 3.2; facebookresearch/moco-v3, adjust_moco_momentum.
    """
    return 1 - (1 - momentum) * (1 + math.cos(math.pi * progress)) / 2
