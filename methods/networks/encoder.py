"""What every encoder is."""

from torch import Tensor, nn

from kilobatch.methods.networks.options import Mode


class Encoder(nn.Module):
    """images (N, 3, H, W) -> features (N, features). Heads that follow take its norm's mode."""

    features: int
    norm: Mode

    def forward(self, images: Tensor) -> Tensor:
        raise NotImplementedError
