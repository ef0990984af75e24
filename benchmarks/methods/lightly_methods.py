"""Methods as lightly has them: its heads, losses, memories and schedules, in a plain loop of torch.

The loop's batches are our loader's, so that images, views and their order are the same; the encoder, the optimizer and
the schedule are those of benchmarks.methods. Heads have the sizes of our recipes for CIFAR-10.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from lightly import loss as losses  # pyright: ignore[reportMissingImports]
from lightly.models import utils  # pyright: ignore[reportMissingImports]
from lightly.models.modules import NNMemoryBankModule, SwaVPrototypes, heads  # pyright: ignore[reportMissingImports]
from lightly.utils.scheduler import cosine_schedule  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn


class LightlyMethod(nn.Module):
    """A method of lightly's; before_step gets the number of the step and of all, the others the epoch."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def before_step(self, step: int, steps: int) -> None:
        """What lightly's examples do before a step."""

    def loss(self, first: Tensor, second: Tensor, epoch: int) -> Tensor:
        raise NotImplementedError

    def before_optimizer(self, epoch: int) -> None:
        """What they do to gradients."""

    def evaluated(self) -> nn.Module:
        """The encoder whose features are evaluated."""
        return self.encoder


class Siamese(LightlyMethod):
    """One network for both views, and a loss of the pair."""

    def __init__(self, encoder: nn.Module, head: nn.Module, criterion: nn.Module) -> None:
        super().__init__(encoder)
        self.head, self.criterion = head, criterion

    def loss(self, first: Tensor, second: Tensor, epoch: int) -> Tensor:
        z1, z2 = (self.head(self.encoder(view)).float() for view in (first, second))
        return self.criterion(z1, z2)


class Followed(LightlyMethod):
    """A network, and a target that follows it with a momentum from `start` to `end`."""

    def __init__(self, encoder: nn.Module, head: nn.Module, start: float, end: float) -> None:
        super().__init__(encoder)
        self.head, self.start, self.end = head, start, end
        self.target_encoder, self.target_head = deepcopy(encoder), deepcopy(head)
        for network in (self.target_encoder, self.target_head):
            utils.deactivate_requires_grad(network)

    def before_step(self, step: int, steps: int) -> None:
        momentum = cosine_schedule(step, steps, self.start, self.end)
        utils.update_momentum(self.encoder, self.target_encoder, momentum)
        utils.update_momentum(self.head, self.target_head, momentum)

    @torch.no_grad()
    def target(self, view: Tensor) -> Tensor:
        return self.target_head(self.target_encoder(view)).float()


class MoCo(Followed):
    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__(encoder, heads.MoCoProjectionHead(width, width, 128), 0.99, 0.99)
        self.criterion = losses.NTXentLoss(temperature=0.1, memory_bank_size=(8192, 128))

    def loss(self, first: Tensor, second: Tensor, epoch: int) -> Tensor:
        halves = [
            self.criterion(self.head(self.encoder(a)).float(), self.target(b))
            for a, b in ((first, second), (second, first))
        ]
        return 0.5 * (halves[0] + halves[1])


class BYOL(Followed):
    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__(encoder, heads.BYOLProjectionHead(width, 4096, 256), 0.99, 1.0)
        self.predictor, self.criterion = heads.BYOLPredictionHead(256, 4096, 256), losses.NegativeCosineSimilarity()

    def loss(self, first: Tensor, second: Tensor, epoch: int) -> Tensor:
        p1, p2 = (self.predictor(self.head(self.encoder(view))).float() for view in (first, second))
        return 0.5 * (self.criterion(p1, self.target(second)) + self.criterion(p2, self.target(first)))


class SimSiam(LightlyMethod):
    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__(encoder)
        self.head = heads.SimSiamProjectionHead(width, 2048, 2048)
        self.predictor, self.criterion = heads.SimSiamPredictionHead(2048, 512, 2048), losses.NegativeCosineSimilarity()

    def loss(self, first: Tensor, second: Tensor, epoch: int) -> Tensor:
        z1, z2 = (self.head(self.encoder(view)) for view in (first, second))
        p1, p2 = (self.predictor(z).float() for z in (z1, z2))
        z1, z2 = z1.detach().float(), z2.detach().float()
        return 0.5 * (self.criterion(p1, z2) + self.criterion(p2, z1))


class NNCLR(LightlyMethod):
    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__(encoder)
        self.head = heads.NNCLRProjectionHead(width, 2048, 256)
        self.predictor = heads.NNCLRPredictionHead(256, 4096, 256)
        self.memory, self.criterion = NNMemoryBankModule(size=(8192, 256)), losses.NTXentLoss(temperature=0.2)

    def loss(self, first: Tensor, second: Tensor, epoch: int) -> Tensor:
        z1, z2 = (self.head(self.encoder(view)) for view in (first, second))
        p1, p2 = (self.predictor(z).float() for z in (z1, z2))
        z1 = self.memory(z1.detach().float(), update=False)
        z2 = self.memory(z2.detach().float(), update=True)
        return 0.5 * (self.criterion(z1, p2) + self.criterion(z2, p1))


class SwAV(LightlyMethod):
    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__(encoder)
        self.head, self.prototypes = heads.SwaVProjectionHead(width, 2048, 128), SwaVPrototypes(128, 3000, 2)
        self.criterion = losses.SwaVLoss()

    def before_step(self, step: int, steps: int) -> None:
        self.prototypes.normalize()  # pyright: ignore[reportCallIssue]

    def loss(self, first: Tensor, second: Tensor, epoch: int) -> Tensor:
        both = [nn.functional.normalize(self.head(self.encoder(view)).float(), dim=1) for view in (first, second)]
        with torch.autocast("cpu", enabled=False):
            return self.criterion([self.prototypes(z, epoch) for z in both], [])


class DINO(Followed):
    def __init__(self, encoder: nn.Module, width: int) -> None:
        head = heads.DINOProjectionHead(width, 2048, 256, 4096, freeze_last_layer=1)
        super().__init__(encoder, head, 0.9995, 1.0)
        self.criterion = losses.DINOLoss(output_dim=4096, warmup_teacher_temp_epochs=10, teacher_temp=0.07)

    def loss(self, first: Tensor, second: Tensor, epoch: int) -> Tensor:
        student = [self.head(self.encoder(view)).float() for view in (first, second)]
        return self.criterion([self.target(first), self.target(second)], student, epoch=epoch)

    def evaluated(self) -> nn.Module:
        return self.target_encoder  # the teacher, as of ours and of the authors

    def before_optimizer(self, epoch: int) -> None:
        self.head.cancel_last_layer_gradients(current_epoch=epoch)  # pyright: ignore[reportCallIssue]


def _simclr(encoder: nn.Module, width: int) -> LightlyMethod:
    head = heads.SimCLRProjectionHead(width, width, 128, num_layers=3)
    return Siamese(encoder, head, losses.NTXentLoss(temperature=0.5))


def _barlow_twins(encoder: nn.Module, width: int) -> LightlyMethod:
    return Siamese(encoder, heads.BarlowTwinsProjectionHead(width, 2048, 2048), losses.BarlowTwinsLoss(5.1e-3))


def _vicreg(encoder: nn.Module, width: int) -> LightlyMethod:
    return Siamese(encoder, heads.VICRegProjectionHead(width, 2048, 2048, num_layers=3), losses.VICRegLoss())


LIGHTLY_METHODS: dict[str, Callable[[Any, int], LightlyMethod]] = {
    "simclr": _simclr,
    "moco_v2": MoCo,
    "byol": BYOL,
    "simsiam": SimSiam,
    "nnclr": NNCLR,
    "swav": SwAV,
    "dino": DINO,
    "barlow_twins": _barlow_twins,
    "vicreg": _vicreg,
}
