"""ResNets (He et al. 2015, arxiv.org/abs/1512.03385) with torchvision's parameter names, without the classifier.

The stride stands in a bottleneck's 3x3 convolution, as in torchvision ("v1.5").
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.encoder import Encoder
from methods.encoder_options import Mode, Stem
from methods.norm import BatchNorm


class Basic(nn.Module):
    expansion = 1

    def __init__(self, inside: int, width: int, stride: int, norm: Mode) -> None:
        super().__init__()
        self.conv1 = _conv(inside, width, 3, stride)
        self.bn1 = BatchNorm(width, norm)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = BatchNorm(width, norm)
        self.downsample = _downsample(inside, width, stride, norm)

    @property
    def last_norm(self) -> BatchNorm:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inside: int, width: int, stride: int, norm: Mode) -> None:
        super().__init__()
        self.conv1 = _conv(inside, width, 1)
        self.bn1 = BatchNorm(width, norm)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = BatchNorm(width, norm)
        self.conv3 = _conv(width, 4 * width, 1)
        self.bn3 = BatchNorm(4 * width, norm)
        self.downsample = _downsample(inside, 4 * width, stride, norm)

    @property
    def last_norm(self) -> BatchNorm:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


LAYERS: dict[str, tuple[type[Basic] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (Basic, (2, 2, 2, 2)),
    "resnet34": (Basic, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(Encoder):
    """Images (N, 3, H, W) -> pooled features (N, 512) or (N, 2048).

    stem "imagenet": 7x7 stride 2 and max-pool; "cifar": 3x3 stride 1, no max-pool (SimCLR, appendix B.9).
    zero_init: the last gamma of each block starts at zero, so that blocks start as the identity (Goyal et al. 2017).
    """

    def __init__(self, name: str, stem: Stem = "imagenet", norm: Mode = "global", zero_init: bool = True) -> None:
        super().__init__()
        block, depths = LAYERS[name]
        self.stem, self.norm, self.features = stem, norm, 512 * block.expansion
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False) if stem == "imagenet" else _conv(3, 64, 3)
        self.bn1 = BatchNorm(64, norm)
        inside = 64
        for i, depth in enumerate(depths):
            width, stride = 64 * 2**i, 1 if i == 0 else 2
            blocks: list[Basic | Bottleneck] = []
            for j in range(depth):
                blocks.append(block(inside, width, stride if j == 0 else 1, norm))
                inside = width * block.expansion
                if zero_init:
                    nn.init.zeros_(blocks[-1].last_norm.weight)
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        # Channels-last is faster everywhere; on the input, because DeepSpeed takes no such parameters.
        x = images.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, 2, 1)
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        return x.mean((2, 3))


def torchvision_state_dict(encoder: dict[str, Tensor], classes: int = 1000) -> dict[str, Tensor]:
    """The state dict of an encoder, with the classifier that torchvision's model of the same name wants: zeros, since
    nothing has trained it. Loads strictly where the stem is "imagenet"; no tensor is copied.
    """
    last = encoder["layer4.0.downsample.1.weight" if "layer4.0.conv3.weight" in encoder else "layer4.0.bn2.weight"]
    fc = {"fc.weight": last.new_zeros(classes, len(last)), "fc.bias": last.new_zeros(classes)}
    return {**encoder, **fc}


def _conv(inside: int, outside: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)


def _downsample(inside: int, outside: int, stride: int, norm: Mode) -> nn.Sequential | None:
    if stride == 1 and inside == outside:
        return None
    return nn.Sequential(_conv(inside, outside, 1, stride), BatchNorm(outside, norm))
