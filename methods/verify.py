"""What a method's gradients are held to: the paper's formula in the plainest code, and constructions known to be wrong.

Independent of the method's own loss on purpose: neither tiles, nor closed gradients, nor methods.losses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data.refusal import Refusal, did_you_mean
from methods import across

Pairing = Callable[[Tensor, Tensor, float], Tensor]  # z1, z2 (n, D), temperature -> loss


@dataclass(frozen=True)
class Construction:
    """loss: of one rank's samples; formula: what it should be, of all samples in one process; right: whether it is."""

    name: str
    loss: Pairing
    formula: Pairing
    right: bool


@dataclass(frozen=True)
class Standard:
    formula: Pairing
    constructions: tuple[Construction, ...]


def standard(method: str) -> Standard:
    """Raises Refusal for a method that has none."""
    if method not in STANDARDS:
        raise Refusal(f"there is no parity table for '{method}'{did_you_mean(method, STANDARDS)}")
    return STANDARDS[method]


def ntxent_formula(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """SimCLR, eq. 1 and algorithm 1: the mean over all 2N anchors of -log softmax over the 2N - 1 others."""
    return _anchors(torch.cat([z1, z2]), z1, z2, 0, temperature)


def _anchors(z: Tensor, every1: Tensor, every2: Tensor, first: int, temperature: float) -> Tensor:
    """z (2n, D): anchors, whose first views stand from row `first` in every1 and second views in every2 (N, D)."""
    n, total = len(z) // 2, len(every1)
    me = torch.arange(first, first + n)
    me = torch.cat([me, me + total])  # (2n,), each anchor's place among the 2N
    logits = F.normalize(z, dim=1) @ F.normalize(torch.cat([every1, every2]), dim=1).T / temperature
    logits = logits.scatter(1, me[:, None], -torch.inf)  # the anchor itself
    return F.cross_entropy(logits, (me + total) % (2 * total))


def _own_anchors(z1: Tensor, z2: Tensor, every: Callable[[Tensor], Tensor], temperature: float) -> Tensor:
    return _anchors(torch.cat([z1, z2]), every(z1), every(z2), across.rank() * len(z1), temperature)


def _own_slice(z: Tensor) -> Tensor:
    """A gather whose backward gives each rank its own loss's gradient alone."""
    parts = list(across.gather(z.detach()).chunk(across.size()))
    parts[across.rank()] = z
    return torch.cat(parts)


def _no_gradient(z: Tensor) -> Tensor:
    return across.gather(z.detach())


def _clip_formula(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Radford et al. 2021, figure 3, with a fixed temperature."""
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature
    target = torch.arange(len(z1))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _clip_local(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    u, v = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    target = torch.arange(len(u)) + across.rank() * len(u)
    by_u = F.cross_entropy(u @ _no_gradient(v).T / temperature, target)
    return (by_u + F.cross_entropy(v @ _no_gradient(u).T / temperature, target)) / 2


def _simclr(name: str, loss: Pairing, right: bool = False) -> Construction:
    return Construction(name, loss, ntxent_formula, right)


STANDARDS = {
    "simclr": Standard(
        ntxent_formula,
        (
            _simclr(
                "own anchors, gather whose backward sums", lambda a, b, t: _own_anchors(a, b, across.gather, t), True
            ),
            _simclr(
                "own anchors, gather whose backward keeps its slice", lambda a, b, t: _own_anchors(a, b, _own_slice, t)
            ),
            _simclr("own anchors, gather without gradient", lambda a, b, t: _own_anchors(a, b, _no_gradient, t)),
            _simclr(
                "whole loss on every rank, own slice", lambda a, b, t: ntxent_formula(_own_slice(a), _own_slice(b), t)
            ),
            _simclr("negatives of the own rank only", ntxent_formula),
            Construction("CLIP's own anchors, gather without gradient", _clip_local, _clip_formula, False),
        ),
    )
}
