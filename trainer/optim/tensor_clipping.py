"""Clips each parameter's gradient by its own norm, as DINO's authors do, just before the optimizer's update."""

# pyright: reportPrivateImportUsage=false

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kilobatch.trainer.optim.norms import parameter_norms
from kilobatch.trainer.optim.zero_partitions import Partition

EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_ and in facebookresearch/dino, utils.clip_gradients


class TensorClipping:
    """A hook before each step of an optimizer: gradients have been averaged over ranks and freed of fp16's scale.

    Each gradient g becomes g * min(1, bound / (|g| + 1e-6)). Under ZeRO the norms are those of whole parameters, by one
    all-reduce of a number for each parameter of a group.
    """

    def __init__(self, bound: float, partitions: Sequence[Partition]) -> None:
        self._bound = bound
        self._partitions = {part.flat: part for part in partitions}

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._clip([p.grad for p in params], self._partitions.get(params[0]))

    def _clip(self, grads: list[Tensor], part: Partition | None) -> None:
        """grads: of whole parameters, or the flat one that `part` lies in."""
        own = grads if part is None else part.of(grads[0])
        factors = (self._bound / (parameter_norms([own], part)[0] + EPSILON)).clamp(max=1.0)
        if own:
            torch._foreach_mul_(own, (factors if part is None else factors[part.parameters]).unbind())
