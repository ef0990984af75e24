"""Selective kernels: Li et al. 2019, arxiv.org/abs/1903.06586, in the form of SimCLRv2, whose authors run both streams
with 3x3 kernels: google-research/simclr, tf2/resnet.py, SK_Conv2D."""

import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.methods.networks.batch_norm import BatchNorm
from kilobatch.methods.networks.options import Mode

LEAST = 32  # channels of a squeeze


class SelectiveKernels(nn.Module):
    """(N, f, H, W) -> (N, f, H / stride, W / stride): the sum of two streams, each channel weighed by what all see.

    One convolution makes both streams, a and b; m = mix(relu(norm(squeeze(mean over pixels of a + b)))) (N, 2 f) holds
    two numbers for each channel, whose softmax weighs a against b. The squeeze has max(int(f * ratio), 32) channels.
    """

    def __init__(self, features: int, stride: int, norm: Mode, ratio: float) -> None:
        super().__init__()
        squeezed = max(int(features * ratio), LEAST)
        self.conv = nn.Conv2d(features, 2 * features, 3, stride, 1, bias=False)
        self.bn = BatchNorm(2 * features, norm)
        self.squeeze = nn.Conv2d(features, squeezed, 1, bias=False)
        self.squeeze_bn = BatchNorm(squeezed, norm)
        self.mix = nn.Conv2d(squeezed, 2 * features, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.bn(self.conv(x)), inplace=True).chunk(2, 1)  # (N, f, H, W) each
        seen = a.mean((2, 3), keepdim=True) + b.mean((2, 3), keepdim=True)  # (N, f, 1, 1)
        mixing = self.mix(F.relu(self.squeeze_bn(self.squeeze(seen)), inplace=True))
        for_a, for_b = mixing.unflatten(1, (2, -1)).softmax(1).unbind(1)
        return a * for_a + b * for_b


class AveragePool(nn.Module):
    """2x2 of stride 1 or 2 before a shortcut's convolution, with the authors' padding.

    Stride 1 keeps the side: a window that reaches beyond an edge averages what is inside, which is the average where
    the edge is repeated. Stride 2 of an odd side counts a row and a column of zeros.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, 1)
        height, width = (side % 2 for side in x.shape[2:])
        return F.avg_pool2d(F.pad(x, (0, width, 0, height)) if height or width else x, 2, 2)

    def extra_repr(self) -> str:
        return f"stride={self.stride}"
