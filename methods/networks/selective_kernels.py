"""Selective kernels: Li et al. 2019, arxiv.org/abs/1903.06586, as in SimCLRv2.

Its authors run both streams with 3x3 kernels: google-research/simclr, tf2/resnet.py, SK_Conv2D.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.methods.networks.batch_norm import BatchNorm
from kilobatch.methods.networks.options import Mode

MIN_CHANNELS = 32  # channels of a squeeze


class SelectiveKernels(nn.Module):
    """The weighted sum of two streams, (N, f, H, W) -> (N, f, H / stride, W / stride); weights come from all channels.

    One convolution makes both streams, a and b; m = mix(relu(norm(squeeze(mean over pixels of a + b)))) (N, 2 f) holds
    two numbers for each channel, whose softmax weighs a against b. The squeeze has max(int(f * ratio), 32) channels.
    """

    def __init__(self, features: int, stride: int, norm: Mode, ratio: float) -> None:
        super().__init__()
        squeezed = max(int(features * ratio), MIN_CHANNELS)
        self.conv = nn.Conv2d(features, 2 * features, 3, stride, 1, bias=False)
        self.bn = BatchNorm(2 * features, norm)
        self.squeeze = nn.Conv2d(features, squeezed, 1, bias=False)
        self.squeeze_bn = BatchNorm(squeezed, norm)
        self.mix = nn.Conv2d(squeezed, 2 * features, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.bn(self.conv(x)), inplace=True).chunk(2, 1)  # (N, f, H, W) each
        pooled = a.mean((2, 3), keepdim=True) + b.mean((2, 3), keepdim=True)  # (N, f, 1, 1)
        mixing = self.mix(F.relu(self.squeeze_bn(self.squeeze(pooled)), inplace=True))
        weight_a, weight_b = mixing.unflatten(1, (2, -1)).softmax(1).unbind(1)
        return a * weight_a + b * weight_b


class AveragePool(nn.Module):
    """Average pool 2x2 of stride 1 or 2 before a shortcut's convolution, with the SimCLR authors' padding.

    Stride 1 keeps the side: a window that reaches beyond an edge averages the pixels inside, which is what repeating
    the edge gives. Stride 2 pads an odd side by zeros, which count.
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
