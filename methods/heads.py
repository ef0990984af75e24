"""Heads that stand on an encoder while it trains."""

from torch import Tensor, nn

from methods.norm import BatchNorm, Mode


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
