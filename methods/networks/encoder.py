"""The base class of encoders: features, maps, and blocks that may be computed again in the backward."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kilobatch.data.errors import UserError
from kilobatch.methods.networks import batch_norm, keyed_layers
from kilobatch.methods.networks.options import Mode


class Encoder(nn.Module):
    """A network images (N, 3, H, W) -> features (N, features). Heads on top of it take the mode of its norms.

    recomputes: whether its blocks keep their inputs alone, and compute the rest again in the backward (Chen et al.
    2016, arxiv.org/abs/1604.06174).
    """

    features: int
    norm: Mode
    recomputes: bool = False

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

    def stages(self, images: Tensor) -> list[Tensor]:
        """images (N, 3, H, W) -> maps (N, C, H', W') of the network's stages, the coarsest last. Raises UserError for a
        network without maps."""
        raise UserError(
            f"{type(self).__name__} has no maps, only features, and the method reads maps of stages; use an encoder "
            "that has them, such as resnet50"
        )

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        """block(x), of which only x is kept for the backward where the encoder recomputes."""
        if not (self.recomputes and torch.is_grad_enabled()):
            return block(x)
        return compute_again(block, block, x)


def compute_again(block: nn.Module, call: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """call(*inputs, **options), which computes the block, and again in the backward; nothing of it is kept."""
    # Nothing of ours draws from torch's generators, so that their states need not be kept.
    again = partial(_contexts, block)
    return checkpoint(call, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=again, **options)


def _contexts(block: nn.Module) -> tuple[nullcontext[None], "_Again"]:
    """The contexts of a block's first computation and of the later ones."""
    return nullcontext(), _Again(block)


class _Again:
    """Computes a block a second time as it was the first time: keyed layers draw the same numbers, and norms are the
    same, but count nothing. Other chunks may have been computed meanwhile."""

    def __init__(self, block: nn.Module) -> None:
        layers, norms = keyed_layers.find(block), batch_norm.norms(block)
        self._then = [(m, name, getattr(m, name)) for m in layers for name in ("keys", "calls", "number", "off")]
        self._then += [(norm, "stand_in", norm.stand_in) for norm in norms]
        self._then += [(norm, "counts", False) for norm in norms]
        self._now = self._then

    def __enter__(self) -> None:
        self._now = [(m, name, getattr(m, name)) for m, name, _ in self._then]
        for m, name, value in self._then:
            setattr(m, name, value)

    def __exit__(self, *_: Any) -> None:
        for m, name, value in self._now:
            setattr(m, name, value)
