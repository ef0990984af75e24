"""The base class of encoders."""

from torch import Tensor, nn

from kilobatch.methods.networks.options import Mode


class Encoder(nn.Module):
    """A network images (N, 3, H, W) -> features (N, features). Heads on top of it take the mode of its norms."""

    features: int
    norm: Mode

    def forward(self, images: Tensor) -> Tensor:
        raise NotImplementedError
