"""The teacher in distillation: a trained method whose logits are used and whose weights never change."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kilobatch.methods.method import Method
from kilobatch.methods.networks.classifier import Classifier
from kilobatch.methods.options import TeacherPrecision


class Teacher:
    """The logits of a trained method that classifies, frozen and in eval mode.

    It is no nn.Module, so that the student's parameters(), optimizer, state dict and checkpoints do not contain it.
    precision bf16: the kernels of convolutions and linear layers are stored and computed with in bfloat16, at half the
    memory (attention's projections of its input stay fp32); norms, their statistics, the classifier and the logits are
    fp32. precision fp32: the weights are stored in fp32, and computed with as engine.precision says.
    """

    def __init__(self, method: Method, precision: TeacherPrecision) -> None:
        self.method, self.halved = method.eval().requires_grad_(False), precision == "bf16"
        if self.halved:
            for module in method.modules():
                if isinstance(module, nn.Conv2d | nn.Linear) and not isinstance(module, Classifier):
                    module.to(torch.bfloat16)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> (N, classes)."""
        if not self.halved:
            return self.method.logits(images)
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.method.logits(images)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Applies change to every tensor, as nn.Module._apply does: for moves to a device."""
        self.method._apply(change)
