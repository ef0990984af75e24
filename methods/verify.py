"""What a method's gradients are held to: the paper's formula in the plainest code, and constructions known to be wrong.

Independent of the method's own loss on purpose: neither tiles, nor closed gradients, nor methods.losses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from data.refusal import Refusal, did_you_mean
from methods import across

Pairing = Callable[[Tensor, Tensor], Tensor]  # z1, z2 (n, D) -> loss
Across = Callable[[Tensor], Tensor]  # this rank's -> all ranks', each construction with a backward of its own
TEMPERATURE = 0.2


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


def ntxent_formula(z1: Tensor, z2: Tensor) -> Tensor:
    """SimCLR, eq. 1 and algorithm 1: the mean over all 2N anchors of -log softmax over the 2N - 1 others."""
    return _anchors(torch.cat([z1, z2]), z1, z2, 0)


def _anchors(z: Tensor, every1: Tensor, every2: Tensor, first: int) -> Tensor:
    """z (2n, D): anchors, whose first views stand from row `first` in every1 and second views in every2 (N, D)."""
    n, total = len(z) // 2, len(every1)
    me = torch.arange(first, first + n)
    me = torch.cat([me, me + total])  # (2n,), each anchor's place among the 2N
    logits = F.normalize(z, dim=1) @ F.normalize(torch.cat([every1, every2]), dim=1).T / TEMPERATURE
    logits = logits.scatter(1, me[:, None], -torch.inf)  # the anchor itself
    return F.cross_entropy(logits, (me + total) % (2 * total))


def _own_anchors(z1: Tensor, z2: Tensor, every: Across) -> Tensor:
    return _anchors(torch.cat([z1, z2]), every(z1), every(z2), across.rank() * len(z1))


def _own_slice(z: Tensor) -> Tensor:
    """A gather whose backward gives each rank its own loss's gradient alone."""
    parts = list(across.gather(z.detach()).chunk(across.size()))
    parts[across.rank()] = z
    return torch.cat(parts)


def _no_gradient(z: Tensor) -> Tensor:
    return across.gather(z.detach())


def _clip_formula(z1: Tensor, z2: Tensor) -> Tensor:
    """Radford et al. 2021, figure 3, with a fixed temperature."""
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / TEMPERATURE
    target = torch.arange(len(z1))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _clip_local(z1: Tensor, z2: Tensor) -> Tensor:
    u, v = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    target = torch.arange(len(u)) + across.rank() * len(u)
    by_u = F.cross_entropy(u @ _no_gradient(v).T / TEMPERATURE, target)
    return (by_u + F.cross_entropy(v @ _no_gradient(u).T / TEMPERATURE, target)) / 2


def _barlow_formula(z1: Tensor, z2: Tensor) -> Tensor:
    """Zbontar et al. 2021, arxiv.org/abs/2103.03230, eq. 1 and 2."""
    z1, z2 = z1 - z1.mean(0), z2 - z2.mean(0)
    return _redundancy(z1.T @ z2 / (z1.norm(dim=0)[:, None] * z2.norm(dim=0)))


def _redundancy(c: Tensor) -> Tensor:
    """c (D, D): the cross-correlation. Eq. 1, weighted as in the authors' code."""
    return (1 - c.diagonal()).square().sum() + 0.0051 * _off_diagonal(c).square().sum()


def _barlow_ranks(z1: Tensor, z2: Tensor, total: Across) -> Tensor:
    """The whole loss on every rank, of this rank's part of the cross-correlation summed over ranks by `total`."""
    z1, z2 = (z - across.mean(z.mean(0)) for z in (z1, z2))
    z1, z2 = (z / across.all_sum(z.square().sum(0)).sqrt() for z in (z1, z2))
    return _redundancy(total(z1.T @ z2))


def _in_place(x: Tensor) -> Tensor:
    """An all-reduce that autograd does not see: to its backward, x is still this rank's part."""
    dist.all_reduce(x.detach())
    return x


def _vicreg_formula(z1: Tensor, z2: Tensor) -> Tensor:
    """Bardes et al. 2022, arxiv.org/abs/2105.04906, eq. 6, with the means and weights of the authors' code."""
    return _vicreg(z1, z2, lambda z: z)


def _vicreg(z1: Tensor, z2: Tensor, every: Across) -> Tensor:
    """The invariance of this rank's pairs; the variance and the covariance of all that `every` gives."""
    z1, z2 = 100 * z1, 100 * z2  # the table's network gives a std of 0.01: only near 1 does the covariance count
    return 25 * F.mse_loss(z1, z2) + _spread(every(z1)) + _spread(every(z2))


def _spread(z: Tensor) -> Tensor:
    """What one view adds by eq. 1, the variance's hinge, and eq. 4, the covariance off the diagonal."""
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (len(z) - 1)
    hinge = F.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean()
    return 25 * hinge / 2 + _off_diagonal(covariance).square().sum() / z.shape[1]


def _off_diagonal(x: Tensor) -> Tensor:
    return x - x.diagonal().diag()


def _simclr(name: str, loss: Pairing, right: bool = False) -> Construction:
    return Construction(name, loss, ntxent_formula, right)


def _barlow(name: str, total: Across, right: bool = False) -> Construction:
    return Construction(
        f"Barlow Twins, cross-correlation by {name}", lambda a, b: _barlow_ranks(a, b, total), _barlow_formula, right
    )


STANDARDS = {
    "simclr": Standard(
        ntxent_formula,
        (
            _simclr("own anchors, gather whose backward sums", lambda a, b: _own_anchors(a, b, across.gather), True),
            _simclr("own anchors, gather whose backward keeps its slice", lambda a, b: _own_anchors(a, b, _own_slice)),
            _simclr("own anchors, gather without gradient", lambda a, b: _own_anchors(a, b, _no_gradient)),
            _simclr("whole loss on every rank, own slice", lambda a, b: ntxent_formula(_own_slice(a), _own_slice(b))),
            _simclr("negatives of the own rank only", ntxent_formula),
            Construction("CLIP's own anchors, gather without gradient", _clip_local, _clip_formula, False),
            _barlow("an all-reduce whose backward sums", across.all_sum, True),
            _barlow("an in-place all-reduce", _in_place),
            Construction(
                "VICReg, variance and covariance over all ranks",
                lambda a, b: _vicreg(a, b, across.gather),
                _vicreg_formula,
                True,
            ),
            Construction("VICReg, variance and covariance per rank", _vicreg_formula, _vicreg_formula, False),
        ),
    )
}
