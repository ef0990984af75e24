"""Heads on top of an encoder: projection heads, MLPs, and the normalisation of their outputs."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.methods.networks.batch_norm import BatchNorm
from kilobatch.methods.networks.options import Mode


def hidden_layers(features: int, hidden: int, layers: int, norm: Mode) -> nn.Sequential:
    """`layers` times a linear layer without bias, a norm and a ReLU: (N, features) -> (N, hidden). 0: the identity."""
    modules: list[nn.Module] = []
    for in_features in (features, *(layers - 1) * (hidden,)) if layers else ():
        modules += [nn.Linear(in_features, hidden, bias=False), BatchNorm(hidden, norm), nn.ReLU(inplace=True)]
    return nn.Sequential(*modules)


class ProjectionHead(nn.Module):
    """A projection head (N, features) -> (N, dim): layers - 1 times linear, norm, ReLU, then linear, norm without bias.

    This is the head that the authors of SimCLR (2 layers) and SimCLRv2 (3) run (google-research/simclr, model_util.py,
    proj_head_mode "nonlinear"): no linear layer has a bias, since a norm follows, and the last norm only scales. Their
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


class MLP(nn.Sequential):
    """MoCo v3's MLP (N, widths[0]) -> (N, widths[-1]): facebookresearch/moco-v3, moco/builder.py, _build_mlp.

    Linear layers without bias, norm and ReLU between them; at the end a norm without parameters, unless last_norm is
    False. last_bias: whether the last linear layer has a bias, as SimSiam's predictor; last_affine: whether the norm at
    the end has parameters, as NNCLR's.
    """

    def __init__(
        self,
        widths: Sequence[int],
        norm: Mode,
        last_norm: bool = True,
        *,
        last_bias: bool = False,
        last_affine: bool = False,
    ) -> None:
        layers: list[nn.Module] = []
        for in_features, out_features in zip(widths[:-2], widths[1:-1], strict=True):
            layers += [
                nn.Linear(in_features, out_features, bias=False),
                BatchNorm(out_features, norm),
                nn.ReLU(inplace=True),
            ]
        layers.append(nn.Linear(widths[-2], widths[-1], bias=last_bias))
        if last_norm:
            layers.append(BatchNorm(widths[-1], norm, affine=last_affine))
        super().__init__(*layers)


class Directions(nn.Module):
    """`count` directions (count, dim): unit rows, of weights that are normalised where they are used, as torch's
    weight_norm has them. scaled: each has a length besides, which is learnt and starts at 1."""

    def __init__(self, dim: int, count: int, scaled: bool = False) -> None:
        super().__init__()
        self.weight = nn.Linear(dim, count, bias=False).weight
        self.length = nn.Parameter(torch.ones(count, 1)) if scaled else None

    def forward(self) -> Tensor:
        rows = unit(self.weight)
        return rows if self.length is None else rows * self.length


class BottleneckHead(nn.Module):
    """DINO's head (N, features) -> (N, dim), unit rows, and the prototypes that they are compared with.

    Three linear layers with biases and GELU between them; truncated normal weights of standard deviation 0.02
    (facebookresearch/dino, vision_transformer.py, DINOHead, whose last layer are the prototypes). norm: of its hidden
    layers; None: they have none.
    """

    def __init__(self, features: int, hidden: int, dim: int, prototypes: Directions, norm: Mode | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for in_features in (features, hidden):
            layers += [nn.Linear(in_features, hidden), *([BatchNorm(hidden, norm)] if norm else []), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, dim))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = prototypes

    def forward(self, features: Tensor) -> Tensor:
        return unit(self.layers(features))


class SwAVHead(nn.Sequential):
    """SwAV's and DeepCluster-v2's head (N, features) -> (N, dim): linear, norm, ReLU, linear, both with a bias, which
    torch starts as it does any linear layer: facebookresearch/swav, class ResNet."""

    def __init__(self, features: int, hidden: int, dim: int, norm: Mode) -> None:
        layers = nn.Linear(features, hidden), BatchNorm(hidden, norm), nn.ReLU(inplace=True), nn.Linear(hidden, dim)
        super().__init__(*layers)


def embed_views(encoder: nn.Module, head: nn.Module, groups: Sequence[Tensor]) -> Tensor:
    """Groups of views (n, V_g, 3, H_g, W_g) -> (n, V, D), the groups in order. Norms see all views of one size together
    in the encoder, and all views of all sizes in the head, as in the authors' code of SwAV and DINO."""
    h = [encoder(views.flatten(0, 1)) for views in groups]
    parts = head(torch.cat(h)).split([len(x) for x in h])
    return torch.cat([x.unflatten(0, views.shape[:2]) for x, views in zip(parts, groups, strict=True)], 1)


def unit(x: Tensor) -> Tensor:
    """x (..., D), scaled to rows of length 1, in fp32 at least, whatever the autocast type."""
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
