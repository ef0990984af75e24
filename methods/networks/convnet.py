"""A small encoder for small images, which the demo trains in minutes on a CPU."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.methods.networks.batch_norm import BatchNorm
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.options import Mode

HALVING = 1, 3, 5  # the convolutions of stride 2


class ConvNet(Encoder):
    """Images (N, 3, H, W), H and W about 32 -> pooled features (N, 8 * width).

    Six 3x3 convolutions with 1, 2, 2, 4, 4 and 8 times width channels, each with norm and ReLU; the second, fourth and
    sixth halve the side, so that 32 pixels end at 4.
    """

    def __init__(self, width: int = 16, norm: Mode = "global") -> None:
        super().__init__()
        self.features, self.norm = 8 * width, norm
        channels = [3, *(width * k for k in (1, 2, 2, 4, 4, 8))]
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        for i, (in_channels, out_channels) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
            conv = nn.Conv2d(in_channels, out_channels, 3, stride=2 if i in HALVING else 1, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            self.convs.append(conv)
            self.norms.append(BatchNorm(out_channels, norm))

    def by_depth(self) -> list[tuple[str, ...]]:
        return [(f"convs.{i}", f"norms.{i}") for i in range(len(self.convs))]

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for x in self._maps(images):  # noqa: B007  # the last one is used, and no other kept
            pass
        return x.mean((2, 3))

    def stages(self, images: Tensor) -> list[Tensor]:
        """Four maps: the last of each side, with 1, 2, 4 and 8 times width channels."""
        return [x for i, x in enumerate(self._maps(images)) if i + 1 in (*HALVING, len(self.convs))]

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        x = images.contiguous(memory_format=torch.channels_last)  # faster convolutions, on CPUs too
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)), inplace=True)
            yield x
