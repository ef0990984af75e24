"""The base class of encoders."""

from torch import Tensor, nn

from kilobatch.data.errors import UserError
from kilobatch.methods.networks.options import Mode


class Encoder(nn.Module):
    """A network images (N, 3, H, W) -> features (N, features). Heads on top of it take the mode of its norms."""

    features: int
    norm: Mode

    def forward(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def by_depth(self) -> list[tuple[str, ...]]:
        """The parts that images pass one after the other, by the prefixes of their parameters' names, for
        optimizer.layer_decay. What follows the last part, such as a final norm, is left out. Raises UserError where
        the network does not say."""
        raise UserError(
            f"{type(self).__name__} does not say the order of its parts; use optimizer.layer_decay=1, or an encoder "
            "that does"
        )
