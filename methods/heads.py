"""Heads that stand on an encoder while it trains."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.encoder_options import Mode
from methods.norm import BatchNorm


class ProjectionHead(nn.Module):
    """(N, features) -> (N, dim): linear, norm, ReLU, linear, norm without a bias.

    As the authors of SimCLR run it (google-research/simclr, model_util.py, proj_head_mode "nonlinear"): no linear layer
    has a bias of its own, since a norm follows, and the last norm only scales. Their hidden layer is as wide as the
    features. The weights start as torch starts linear layers (standard deviation 0.013 at 2048 features; theirs: 0.01).
    """

    def __init__(self, features: int, hidden: int, dim: int, norm: Mode) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, hidden, bias=False),
            BatchNorm(hidden, norm),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, dim, bias=False),
            BatchNorm(dim, norm, center=False),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class MLP(nn.Sequential):
    """(N, widths[0]) -> (N, widths[-1]): linear layers without bias, norm and ReLU between them, and at the end a norm
    without parameters, or with last_norm False nothing. facebookresearch/moco-v3, moco/builder.py, _build_mlp.
    """

    def __init__(self, widths: Sequence[int], norm: Mode, last_norm: bool = True) -> None:
        layers: list[nn.Module] = []
        for inside, outside in zip(widths[:-2], widths[1:-1], strict=True):
            layers += [nn.Linear(inside, outside, bias=False), BatchNorm(outside, norm), nn.ReLU(inplace=True)]
        layers.append(nn.Linear(widths[-2], widths[-1], bias=False))
        if last_norm:
            layers.append(BatchNorm(widths[-1], norm, affine=False))
        super().__init__(*layers)


def unit(x: Tensor) -> Tensor:
    """x (..., D) -> its rows at length 1, in fp32 at least, whatever the autocast type."""
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
