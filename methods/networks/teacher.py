"""The teacher in distillation: trained methods whose logits or features are used, and whose weights never change."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.methods.method import Method
from kilobatch.methods.networks.classifier import Classifier
from kilobatch.methods.networks.heads import unit
from kilobatch.methods.options import TeacherPrecision


class Teacher:
    """The logits of a trained method that classifies, frozen and in eval mode.

    It is no nn.Module, so that the student's parameters(), optimizer, state dict and checkpoints do not contain it.
    precision bf16: the kernels of convolutions and linear layers are stored and computed with in bfloat16, at half the
    memory (attention's projections of its input stay fp32); norms, their statistics, the classifier and the logits are
    fp32. precision fp32: the weights are stored in fp32, and computed with as engine.precision says. size: pixels of a
    side that the images are resized to on the device; None: as they are.
    """

    def __init__(self, method: Method, precision: TeacherPrecision, size: int | None = None) -> None:
        self.method, self.halved, self.size = method.eval().requires_grad_(False), precision == "bf16", size
        if self.halved:
            for module in method.modules():
                if isinstance(module, nn.Conv2d | nn.Linear) and not isinstance(module, Classifier):
                    module.to(torch.bfloat16)

    def logits(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> (N, classes)."""
        return self._computed(self.method.logits, images)

    def represent(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> (N, D) features."""
        return self._computed(self.method.represent, images)

    @torch.no_grad()
    def _computed(self, of: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        if self.size is not None and images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        if not self.halved:
            return of(images)
        with torch.autocast(images.device.type, torch.bfloat16):
            return of(images)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies change to every tensor, as nn.Module._apply does: for moves to a device."""
        self.method._apply(change)


class FeatureTeacher:
    """The unit features of trained methods side by side, by 1 / sqrt(their number), so that the whole has length 1 and
    the product of two rows is the mean of the methods' similarities. precision, size: as Teacher has them.
    """

    def __init__(self, methods: Sequence[Method], precision: TeacherPrecision, size: int | None) -> None:
        self.teachers, self.size = [Teacher(method, precision, size) for method in methods], size

    def features(self, like: nn.Module) -> int:
        """The number of features of all, by a blank image on the CPU."""
        p = next(like.parameters())
        side = self.size or 32
        return self(torch.zeros(1, 3, side, side, dtype=p.dtype, device=p.device)).shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> (N, D), unit rows."""
        return torch.cat([unit(teacher.represent(images)) for teacher in self.teachers], 1) / len(self.teachers) ** 0.5

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """As Teacher.apply."""
        for teacher in self.teachers:
            teacher.apply(change)
