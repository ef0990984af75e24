"""Heads that stand on an encoder while it trains."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.data.errors import Refusal
from kilobatch.methods.networks.batch_norm import BatchNorm
from kilobatch.methods.networks.options import Mode


def hidden_layers(features: int, hidden: int, layers: int, norm: Mode) -> nn.Sequential:
    """(N, features) -> (N, hidden): so many times linear without bias, norm, ReLU. Of 0 layers, the identity."""
    modules: list[nn.Module] = []
    for inside in (features, *(layers - 1) * (hidden,)) if layers else ():
        modules += [nn.Linear(inside, hidden, bias=False), BatchNorm(hidden, norm), nn.ReLU(inplace=True)]
    return nn.Sequential(*modules)


class ProjectionHead(nn.Module):
    """(N, features) -> (N, dim): layers - 1 times linear, norm, ReLU, then linear, norm without a bias.

    As the authors of SimCLR (2 layers) and SimCLRv2 (3) run it (google-research/simclr, model_util.py, proj_head_mode
    "nonlinear"): no linear layer has a bias of its own, since a norm follows, and the last norm only scales. Their
    hidden layers are as wide as the features. The weights start as torch starts linear layers (standard deviation 0.013
    at 2048 features; theirs: 0.01).
    """

    def __init__(self, features: int, hidden: int, dim: int, norm: Mode, layers: int = 2) -> None:
        super().__init__()
        assert layers > 0, layers
        self.hidden_count, self.dim = layers - 1, dim
        self.layers = hidden_layers(features, hidden, layers - 1, norm)
        self.layers.append(nn.Linear(hidden if layers > 1 else features, dim, bias=False))
        self.layers.append(BatchNorm(dim, norm, center=False))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)

    def first(self, count: int) -> nn.Sequential:
        """The first layers, sharing this head's modules, with the names of hidden_layers(..., count, ...); of as many
        as there are, those of another such head. Raises Refusal where there are fewer.
        """
        if count > self.hidden_count + 1:
            raise Refusal(
                f"{count} layers are asked of a head of {self.hidden_count + 1}; use at most {self.hidden_count + 1}"
            )
        return self.layers[: 3 * count]


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
