"""The training that both packages get: images, views, encoder, head, optimizer and schedule."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from kilobatch.data.sources.specs import open_source
from kilobatch.data.sources.splits import Split
from kilobatch.trainer.optim.schedules import ScheduleOptions

RECIPE = "simclr_cifar10_lightly"  # its views are those of lightly's own benchmark on CIFAR-10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Setting:
    """width: of the encoder of six convolutions; lr: of AdamW without decay, for the whole batch."""

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

    def changes(self, train: Path, precision: str) -> list[str]:
        """What `kilobatch train` changes in the recipe."""
        return [
            f"data.train=npz:{train}",
            "data.test=null",
            f"data.batch={self.batch}",
            "data.threads=1",
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
            f"run.seed={self.seed}",
        ]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plain_encoder(width: int) -> nn.Sequential:
    """The encoder of six convolutions in plain torch, with the same initialisation; its features: 8 * width."""
    channels = [3, *(width * k for k in (1, 2, 2, 4, 4, 8))]
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip(channels[:-1], channels[1:], strict=True)):
        convolution = nn.Conv2d(before, after, 3, stride=1 + i % 2, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def read_images(source: str, split: Split, most: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The first `most` images, (N, H, W, 3), and their labels. source: as in data.train."""
    opened: Any = open_source(source, split)
    images, labels = zip(*(opened[i] for i in range(min(most, len(opened)))), strict=True)
    return np.stack(images), np.array(labels)
