"""The training that both packages get: images, views, encoder, head, optimizer and schedule."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kilobatch.data.sources.specs import open_source
from kilobatch.data.sources.splits import Split
from kilobatch.trainer.optim.schedules import ScheduleOptions

RECIPE = "simclr_cifar10_lightly"  # its views are those of lightly's own benchmark on CIFAR-10
CIFAR_SIDE = 32  # up to which views are not blurred, and colours change half as much


@dataclass(frozen=True)
class Setting:
    """train: a source, as in data.train; size: of the views; width: of the encoder of six convolutions; lr: of AdamW
    without decay, for the whole batch."""

    train: str
    size: int
    width: int
    epochs: int
    batch: int
    seed: int
    lr: float = 0.002
    temperature: float = 0.5
    warmup_epochs: int = 1

    @property
    def schedule(self) -> ScheduleOptions:
        return ScheduleOptions(epochs=self.epochs, warmup_epochs=self.warmup_epochs)

    @property
    def strength(self) -> float:
        """Of the colours' changes."""
        return 0.5 if self.size <= CIFAR_SIDE else 1.0

    @property
    def blur(self) -> float:
        """The probability."""
        return 0.0 if self.size <= CIFAR_SIDE else 0.5

    def changes(self, precision: str) -> list[str]:
        """What `kilobatch train` changes in the recipe."""
        strong = [round(self.strength * most, 6) for most in (0.8, 0.8, 0.8, 0.2)]
        jitter = dict(zip(("brightness", "contrast", "saturation", "hue"), strong, strict=True))
        blur = "null" if not self.blur else f"{{probability: {self.blur}, border: edge}}"  # Pillow's, as lightly's is
        return [
            f"data.train={self.train}",
            "data.test=null",
            f"data.batch={self.batch}",
            "data.threads=1",
            f"data.views.size={self.size}",
            *(f"data.views.jitter.{name}={value}" for name, value in jitter.items()),
            f"data.views.blur={blur}",
            f"method.temperature={self.temperature}",
            "encoder.name=convnet",
            f"encoder.width={self.width}",
            "optimizer.name=adamw",
            f"optimizer.lr={self.lr}",
            "optimizer.scaling=none",
            "optimizer.weight_decay=0",
            f"schedule.epochs={self.epochs}",
            f"schedule.warmup_epochs={self.warmup_epochs}",
            f"engine.precision={precision}",
            "evaluate.every_epochs=0",
            "evaluate.final=[]",
            "checkpoint.every_minutes=60",
            "run.log_every=5",
            f"run.seed={self.seed}",
        ]


def plain_encoder(width: int) -> nn.Sequential:
    """The encoder of six convolutions in plain torch, with the same initialisation; its features: 8 * width."""
    channels = [3, *(width * k for k in (1, 2, 2, 4, 4, 8))]
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
        convolution = nn.Conv2d(before, after, 3, stride=1 + i % 2, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def images_of(source: str, split: Split, most: int | None) -> "Images":
    """The first images. source: as in data.train; most: None for all."""
    opened: Any = open_source(source, split)
    images, labels = zip(*(opened[i] for i in range(min(most or len(opened), len(opened)))), strict=True)
    return list(images), torch.tensor(labels)


Images = tuple[list[NDArray[np.uint8]], Tensor]  # (H, W, 3) each; their labels (N,)
