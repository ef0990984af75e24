"""ResNets (He et al. 2015, arxiv.org/abs/1512.03385) with torchvision's parameter names, without the classifier.

The stride stands in a bottleneck's 3x3 convolution, as in torchvision ("v1.5"). With selective kernels they are those
of SimCLRv2 (google-research/simclr, tf2/resnet.py): stem and shortcuts of ResNet-D (arxiv.org/abs/1812.01187).
"""

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from kilobatch.data.errors import UserError
from kilobatch.methods.networks.batch_norm import BatchNorm
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.options import EncoderOptions, Mode, Stem
from kilobatch.methods.networks.selective_kernels import AveragePool, SelectiveKernels


class Basic(nn.Module):
    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, norm: Mode) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, width, 3, stride)
        self.bn1 = BatchNorm(width, norm)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = BatchNorm(width, norm)
        self.downsample = _downsample(in_channels, width, stride, norm)

    @property
    def last_norm(self) -> BatchNorm:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, norm: Mode) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, width, 1)
        self.bn1 = BatchNorm(width, norm)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = BatchNorm(width, norm)
        self.conv3 = _conv(width, 4 * width, 1)
        self.bn3 = BatchNorm(4 * width, norm)
        self.downsample = _downsample(in_channels, 4 * width, stride, norm)

    @property
    def last_norm(self) -> BatchNorm:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class SelectiveBottleneck(nn.Module):
    """A bottleneck with selective kernels (`sk`) in place of the 3x3 convolution and its norm. Where the shape changes,
    its shortcut is an average pool, a convolution and a norm, as in ResNet-D."""

    def __init__(self, in_channels: int, width: int, stride: int, norm: Mode, ratio: float) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, width, 1)
        self.bn1 = BatchNorm(width, norm)
        self.sk = SelectiveKernels(width, stride, norm, ratio)
        self.conv3 = _conv(width, 4 * width, 1)
        self.bn3 = BatchNorm(4 * width, norm)
        self.downsample = None
        if stride > 1 or in_channels != 4 * width:
            self.downsample = nn.Sequential(
                AveragePool(stride), _conv(in_channels, 4 * width, 1), BatchNorm(4 * width, norm)
            )

    @property
    def last_norm(self) -> BatchNorm:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn3(self.conv3(self.sk(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


LAYERS: dict[str, tuple[type[Basic] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (Basic, (2, 2, 2, 2)),
    "resnet34": (Basic, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(Encoder):
    """Images (N, 3, H, W) -> pooled features (N, 512 * width), or (N, 2048 * width) from ResNet-50 on.

    stem "imagenet": 7x7 of stride 2 and max-pool; "cifar": 3x3 of stride 1, no max-pool (SimCLR, appendix B.9);
    "imagenet_same": as imagenet, with the max-pool padded as TensorFlow pads it.
    zero_init: the last gamma of each block starts at zero, so that blocks start as the identity (Goyal et al. 2017).
    width: the multiple of every layer's channels. sk_ratio: of selective kernels, networks/selective_kernels.py; 0:
    none. With them the imagenet stem is three 3x3 convolutions, and its max-pool is padded as TensorFlow pads it.
    Weights start as torchvision's do, whatever the width.
    """

    def __init__(
        self,
        name: str,
        stem: Stem = "imagenet",
        norm: Mode = "global",
        zero_init: bool = True,
        width: int = 1,
        sk_ratio: float = 0.0,
    ) -> None:
        super().__init__()
        block, depths = LAYERS[name]
        assert not sk_ratio or block is Bottleneck, f"{name} has no bottlenecks for selective kernels"
        self.stem, self.norm, self.features = stem, norm, 512 * width * block.expansion
        self.pads_as_tensorflow = bool(sk_ratio) or stem == "imagenet_same"
        in_channels = 64 * width
        if stem == "cifar":
            self.conv1 = _conv(3, in_channels, 3)
        else:
            self.conv1 = (
                _stem_of_three_convs(in_channels, norm) if sk_ratio else nn.Conv2d(3, in_channels, 7, 2, 3, bias=False)
            )
        self.bn1 = BatchNorm(in_channels, norm)
        for i, depth in enumerate(depths):
            channels = 64 * width * 2**i
            blocks: list[Basic | Bottleneck | SelectiveBottleneck] = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                if sk_ratio:
                    blocks.append(SelectiveBottleneck(in_channels, channels, stride, norm, sk_ratio))
                else:
                    blocks.append(block(in_channels, channels, stride, norm))
                in_channels = channels * block.expansion
                if zero_init:
                    nn.init.zeros_(blocks[-1].last_norm.weight)
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def by_depth(self) -> list[tuple[str, ...]]:
        """The stem and the four stages."""
        return [("conv1", "bn1"), *((f"layer{i}",) for i in range(1, 5))]

    def forward(self, images: Tensor) -> Tensor:
        x = self._stem(images)
        for i in range(1, 5):
            x = self._layer(i, x)
        return x.mean((2, 3))

    def stages(self, images: Tensor) -> list[Tensor]:
        """The maps after layer1 to layer4, with 1, 2, 4 and 8 times the channels of the first."""
        maps = [self._layer(1, self._stem(images))]
        for i in range(2, 5):
            maps.append(self._layer(i, maps[-1]))
        return maps

    def _stem(self, images: Tensor) -> Tensor:
        # Channels-last is faster everywhere. Only the input has it: DeepSpeed takes no channels-last parameters.
        x = images.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.stem != "cifar":
            x = _max_pool_same(x) if self.pads_as_tensorflow else F.max_pool2d(x, 3, 2, 1)
        return x

    def _layer(self, i: int, x: Tensor) -> Tensor:
        layer = self.get_submodule(f"layer{i}")
        if not self.recomputes:
            return layer(x)
        for block in layer.children():
            x = self.run(block, x)
        return x


def resnet(depth: int, width: int = 1, sk_ratio: float = 0.0) -> ResNet:
    """ResNet-18, 34, 50, 101 or 152 without classifier, `width` times as wide, such as those of SimCLRv2's table 1.

    sk_ratio: of selective kernels (from ResNet-50 on; the papers' is 0.0625), 0 for none. Raises UserError for a depth,
    width or ratio that does not exist.
    """
    if (name := f"resnet{depth}") not in LAYERS:
        raise UserError(f"there is no ResNet-{depth}; known: {', '.join(LAYERS)}")
    options = {"name": name, "width": width, "sk_ratio": sk_ratio}
    try:
        validated = EncoderOptions.model_validate(options)
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
    return ResNet(name, validated.stem, validated.norm, validated.zero_init, width, sk_ratio)


def torchvision_state_dict(encoder: dict[str, Tensor], classes: int = 1000) -> dict[str, Tensor]:
    """The state dict of torchvision's model of the same name, from an encoder's: with a classifier of zeros, since
    none has been trained. It loads strictly where the stem is "imagenet"; no tensor is copied.
    """
    last_norm = encoder["layer4.0.downsample.1.weight" if "layer4.0.conv3.weight" in encoder else "layer4.0.bn2.weight"]
    classifier = {"fc.weight": last_norm.new_zeros(classes, len(last_norm)), "fc.bias": last_norm.new_zeros(classes)}
    return {**encoder, **classifier}


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)


def _downsample(in_channels: int, out_channels: int, stride: int, norm: Mode) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), BatchNorm(out_channels, norm))


def _stem_of_three_convs(width: int, norm: Mode) -> nn.Sequential:
    half = width // 2
    return nn.Sequential(
        _conv(3, half, 3, 2),
        BatchNorm(half, norm),
        nn.ReLU(inplace=True),
        _conv(half, half, 3),
        BatchNorm(half, norm),
        nn.ReLU(inplace=True),
        _conv(half, width, 3),
    )


def _max_pool_same(x: Tensor) -> Tensor:
    """Max-pool 3x3 of stride 2, padded as TensorFlow's SAME: an even side by one at its end, an odd one at both."""
    return F.max_pool2d(x, 3, 2, (x.shape[2] % 2, x.shape[3] % 2), ceil_mode=True)
