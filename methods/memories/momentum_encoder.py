"""The momentum encoder: an exponential moving average of the encoder."""

import copy
import math

import torch
from torch import Tensor, nn

from kilobatch.methods.networks import batch_norm as norm


class MomentumEncoder(nn.Module):
    """A copy of `online` that follows it by an exponential moving average: section 3.3, eq. 2.

    Its norms take their own batch's statistics in training, as the paper's do, but leave no trace of them: its running
    statistics are those of the online network at the last follow(). No gradient, so that neither the optimizer nor the
    gradients' average over ranks sees it. Averages are of the fp32 parameters, whatever the autocast type.
    """

    def __init__(self, online: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(online).requires_grad_(False)
        for module in norm.norms(self.network):
            module.counts = False

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    @torch.no_grad()
    def follow(self, online: nn.Module, momentum: float) -> None:
        """Moves 1 - momentum of the way to online, the network that it was made from; takes over its buffers."""
        torch._foreach_lerp_([*self.network.parameters()], [*online.parameters()], 1 - momentum)  # pyright: ignore
        if buffers := [*self.network.buffers()]:
            torch._foreach_copy_(buffers, [*online.buffers()])  # pyright: ignore[reportPrivateImportUsage]


def rising(momentum: float, progress: float) -> float:
    """From momentum at progress 0 to 1 at progress 1, by half a cosine: MoCo v3's and BYOL's momentum.

    Grill et al. 2020, arxiv.org/abs/2006.07733, section 3.2; facebookresearch/moco-v3, adjust_moco_momentum.
    """
    return 1 - (1 - momentum) * (1 + math.cos(math.pi * progress)) / 2
