"""The momentum encoder: an exponential moving average of the encoder."""

import copy
import math

import torch
from torch import Tensor, nn

from kilobatch.methods.networks import batch_norm, keyed_layers


class MomentumEncoder(nn.Module):
    """A copy of `online` that follows it by an exponential moving average: MoCo, section 3.2, eq. 2.

    In training its norms use the statistics of their own batch, as the paper's do, but do not record them: its running
    statistics are those of the online network at the last follow(). own_statistics: they record them instead, once a
    step as the online network's do: for a momentum encoder whose features are kept, since the online network's
    statistics are those of other weights and, with small crops, of other images.

    Its dropout and drop path never draw. Its parameters take no gradient, so that neither
    the optimizer nor the gradients' average over ranks includes them. Averages are of the fp32 parameters, whatever the
    autocast type.
    """

    def __init__(self, online: nn.Module, own_statistics: bool = False) -> None:
        super().__init__()
        self.network = copy.deepcopy(online).requires_grad_(False)
        for norm in batch_norm.norms(self.network):
            norm.counts = own_statistics
        keyed_layers.use_keyed_layers(self.network, "momentum encoder")
        for layer in keyed_layers.find(self.network):
            layer.off = True
        norms = {name for name, m in self.network.named_modules() if isinstance(m, batch_norm.BatchNorm)}
        names = [name for name, _ in self.network.named_buffers()]
        self._copied = [name for name in names if not (own_statistics and name.rpartition(".")[0] in norms)]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    @torch.no_grad()
    def follow(self, online: nn.Module, momentum: float) -> None:
        """Moves the parameters 1 - momentum of the way to those of online, the network that it is a copy of, and copies
        its buffers, but for statistics of its own."""
        torch._foreach_lerp_([*self.network.parameters()], [*online.parameters()], 1 - momentum)  # pyright: ignore
        if self._copied:
            mine, theirs = dict(self.network.named_buffers()), dict(online.named_buffers())
            pairs = [mine[name] for name in self._copied], [theirs[name] for name in self._copied]
            torch._foreach_copy_(*pairs)  # pyright: ignore[reportPrivateImportUsage]


def rising(momentum: float, progress: float) -> float:
    """A momentum that rises by half a cosine, from `momentum` at progress 0 to 1 at progress 1: MoCo v3's and BYOL's.

    Grill et al. 2020, arxiv.org/abs/2006.07733, section 3.2; facebookresearch/moco-v3, adjust_moco_momentum.
    """
    return 1 - (1 - momentum) * (1 + math.cos(math.pi * progress)) / 2
