"""Layers that draw: dropout, drop path and noise, by the keys of samples.

A library's layers draw from a generator, whose numbers depend on the rank, on the chunks and on all draws before. These
draw by (sample, step, layer, call, row), so that they are the same for a sample on any ranks x chunks.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kilobatch.data.errors import UserError
from kilobatch.data.tensor_rng import NETWORK, child, part_keys

Unit = Literal["element", "channel", "row"]  # what is dropped as a whole

# Layers of torch, timm and torchvision that draw in training and have no keyed form.
REFUSED = {
    "RReLU": "a LeakyReLU",
    "AlphaDropout": "nn.Dropout",
    "FeatureAlphaDropout": "nn.Dropout2d",
    "FractionalMaxPool2d": "a MaxPool2d",
    "FractionalMaxPool3d": "a MaxPool3d",
    "PatchDropout": "a rate of 0",
    "DropBlock2d": "nn.Dropout2d",
    "DropBlock3d": "nn.Dropout3d",
}


class Keyed(nn.Module):
    """A layer that draws in training. Its input has R rows for the n samples of a chunk, sample by sample, R / n each:
    views (n, V, …) flattened to (n V, …), or one view at a time.

    The trainer gives it the keys of the chunk's samples before each embed (`drawing`). number: of the layer among those
    of the method; calls: since the keys were given; off: whether it never draws, as in a momentum encoder.
    """

    def __init__(self) -> None:
        super().__init__()
        self.off, self.number, self.calls = False, 0, 0
        self.keys: Tensor | None = None

    @property
    def draws(self) -> bool:
        return self.training and not self.off

    def bits(self, rows: int, words: int) -> Tensor:
        """(rows, words) int64 of random bits, for the rows of one call. The rows of a sample draw one after another
        from the stream of its key."""
        if self.keys is None:
            raise RuntimeError(
                f"{type(self).__name__} draws by the keys of samples and was given none; call the network inside "
                "`with keyed_layers.drawing(method, batch.keys)`, as the trainer does, or put it in eval mode"
            )
        each, rest = divmod(rows, len(self.keys))
        if rest:
            raise RuntimeError(
                f"{type(self).__name__} was given {rows} rows for {len(self.keys)} samples; every sample needs the "
                "same number of rows, one sample after another, as views.flatten(0, 1) has them"
            )
        of_call = child(self.keys, self.number << 32 | self.calls)
        self.calls += 1
        draws = torch.arange(each * words, device=of_call.device)
        return part_keys(of_call[:, None], draws).view(rows, words)


class KeyedDropout(Keyed):
    """Dropout of (R, …): sets a share of the elements to 0 in training and divides the others by what is left.

    rate: the share, in steps of 2^-16, as a draw has 16 bits; unit: element, channel (dim 1 of (R, C, …)), or row.
    scaled: whether the others are divided. (The rate is not called p, so that code which reads a Dropout's p to draw by
    itself fails, where its numbers would be torch's.) Numbers are the same on CPU and GPU.
    """

    def __init__(self, rate: float = 0.5, unit: Unit = "element", scaled: bool = True) -> None:
        super().__init__()
        assert 0 <= rate <= 1, rate
        self.rate, self.unit, self.scaled = rate, unit, scaled

    def forward(self, x: Tensor) -> Tensor:
        if not self.draws or self.rate == 0:
            return x
        parts = round(self.rate * 2**16)  # dropped of 2**16
        if parts == 2**16:
            return x * 0
        kept_dims = {"element": x.ndim, "channel": 2, "row": 1}[self.unit]
        shape = (*x.shape[:kept_dims], *[1] * (x.ndim - kept_dims))
        count = math.prod(shape[1:])
        # Four draws from each 64-bit word: mixing its bits costs more than all that follows.
        draws = self.bits(len(x), -(-count // 4)).view(torch.int16)[:, :count]
        dropped = (draws < parts - 2**15).view(shape)
        y = x.masked_fill(dropped, 0)  # keeps the mask alone for the backward, a byte each
        return y.mul_(2**16 / (2**16 - parts)) if self.scaled else y

    def extra_repr(self) -> str:
        return f"{self.rate}, unit={self.unit}"


class KeyedDropPath(KeyedDropout):
    """Drop path, or stochastic depth (Huang et al. 2016, arxiv.org/abs/1603.09382): drops whole rows of a branch."""

    def __init__(self, rate: float = 0.0, scaled: bool = True) -> None:
        super().__init__(rate, "row", scaled)


class KeyedNoise(Keyed):
    """Adds normal noise in training: (x (R, …), std) -> x + std * noise. std: a number, or a tensor as x, through which
    gradient flows. Box and Muller (1958) on draws of 32 bits, in float64: equal on CPU and GPU but for rounding."""

    def forward(self, x: Tensor, std: float | Tensor) -> Tensor:
        return x + std * self._normals(x) if self.draws else x

    def _normals(self, x: Tensor) -> Tensor:
        """Standard normal numbers of x's shape and type."""
        count = math.prod(x.shape[1:])
        words = -(-count // 2)
        uniform = (self.bits(len(x), words).view(torch.int32).double() + (2**31 + 0.5)) / 2**32  # in (0, 1)
        radius, angle = (-2 * uniform[:, :words].log()).sqrt(), 2 * math.pi * uniform[:, words:]
        normals = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
        return normals[:, :count].view(x.shape).to(x.dtype)


def find(module: nn.Module) -> list[Keyed]:
    """The keyed layers of a network, in the order of their names."""
    return [m for _, m in sorted(module.named_modules()) if isinstance(m, Keyed)]


@contextmanager
def drawing(module: nn.Module, keys: Tensor) -> Iterator[None]:
    """Lets the keyed layers of a method draw by the keys (n,) int64 of a chunk's samples, each from its call 0 on."""
    found = [m for m in find(module) if not m.off]
    below = child(keys, NETWORK) if found else keys
    try:
        for number, m in enumerate(found):
            m.number, m.calls, m.keys = number, 0, below
        yield
    finally:
        for m in found:
            m.keys = None


@contextmanager
def off(module: nn.Module) -> Iterator[None]:
    """Keeps keyed layers from drawing: targets draw nothing."""
    found = [m for m in find(module) if not m.off]
    try:
        for m in found:
            m.off = True
        yield
    finally:
        for m in found:
            m.off = False


def use_keyed_layers(network: nn.Module, whose: str = "encoder") -> None:
    """Replaces a network's Dropout, DropPath and StochasticDepth by keyed ones. whose: what it is, for messages.

    Raises UserError, by name, for other layers that draw in training. What a forward draws through torch's functions
    cannot be seen here.
    """
    replaced: dict[int, Keyed] = {}  # a layer may stand in several places
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if keyed := replaced.get(id(module)) or _keyed(f"{whose}'s layer {name}", module):
            replaced[id(module)] = keyed
            assert name, "a network is more than one layer"
            network.set_submodule(name, keyed)


def _keyed(name: str, module: Any) -> Keyed | None:
    """The keyed layer that stands for a library's; None for a layer that does not draw. name: of it, in words."""
    kind = type(module).__name__
    match module:
        case nn.Dropout() | nn.Dropout1d() | nn.Dropout2d() | nn.Dropout3d() if module.p == 0:
            return None  # it draws nothing, and timm's fused attention reads its p
        case nn.Dropout():
            return KeyedDropout(module.p)
        case nn.Dropout1d() | nn.Dropout2d() | nn.Dropout3d():
            return KeyedDropout(module.p, "channel")
        case nn.MultiheadAttention() | nn.RNNBase() if module.dropout:
            raise UserError(_refusal(name, kind, f"draws by itself with dropout={module.dropout}", "dropout=0"))
    if kind == "DropPath":  # timm's, by name: nothing here depends on timm
        return KeyedDropPath(module.drop_prob or 0.0, module.scale_by_keep)
    if kind == "StochasticDepth":  # torchvision's
        if module.mode == "row" or not module.p:
            return KeyedDropPath(module.p)
        raise UserError(_refusal(name, kind, f"drops whole batches with mode={module.mode}", "mode=row"))
    known = {cls.__name__ for cls in type(module).__mro__} & REFUSED.keys()
    if known and getattr(module, "p", 1) != 0:
        raise UserError(_refusal(name, kind, "draws from torch's generator", REFUSED[min(known)]))
    return None


def _refusal(name: str, kind: str, why: str, instead: str) -> str:
    return (
        f"the {name} is a {kind}, which {why}, so that results would depend on the number of ranks and "
        f"chunks; use {instead}, or a layer of kilobatch.methods.networks.keyed_layers"
    )
