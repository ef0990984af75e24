"""SimCLR's formula; and constructions around it, and around losses of its kind, that are known to be wrong."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kilobatch.methods import collectives as across
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.methods.parity.standard import TEMPERATURE, Construction, Loss, Standard, no_gradient, own_slice

Pairing = Callable[[Tensor, Tensor], Tensor]  # z1, z2 (n, D) -> loss
Across = Callable[[Tensor], Tensor]  # this rank's -> all ranks', each construction with a backward of its own


def build(mode: Mode) -> Method:
    return SimCLR(ConvNet(4, mode), temperature=TEMPERATURE, dim=8)


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


def clip_formula(z1: Tensor, z2: Tensor, temperature: float | Tensor = TEMPERATURE) -> Tensor:
    """Radford et al. 2021, figure 3."""
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature
    target = torch.arange(len(z1))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _clip_local(z1: Tensor, z2: Tensor) -> Tensor:
    u, v = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    target = torch.arange(len(u)) + across.rank() * len(u)
    by_u = F.cross_entropy(u @ no_gradient(v).T / TEMPERATURE, target)
    return (by_u + F.cross_entropy(v @ no_gradient(u).T / TEMPERATURE, target)) / 2


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


def _views(loss: Pairing) -> Loss:
    def of(method: Method, z: Tensors, t: Tensors) -> Tensor:
        z1, z2 = z["z"].unbind(1)
        return loss(z1, z2)

    return of


def _construction(name: str, loss: Pairing, formula: Pairing = ntxent_formula, right: bool = False) -> Construction:
    return Construction(name, _views(loss), _views(formula), right)


def _barlow(name: str, total: Across, right: bool = False) -> Construction:
    loss: Pairing = lambda a, b: _barlow_ranks(a, b, total)  # noqa: E731
    return _construction(f"Barlow Twins, cross-correlation by {name}", loss, _barlow_formula, right)


STANDARD = Standard(
    build,
    _views(ntxent_formula),
    constructions=(
        _construction(
            "own anchors, gather whose backward sums", lambda a, b: _own_anchors(a, b, across.gather), right=True
        ),
        _construction("own anchors, gather whose backward keeps its slice", lambda a, b: _own_anchors(a, b, own_slice)),
        _construction("own anchors, gather without gradient", lambda a, b: _own_anchors(a, b, no_gradient)),
        _construction("whole loss on every rank, own slice", lambda a, b: ntxent_formula(own_slice(a), own_slice(b))),
        _construction("negatives of the own rank only", ntxent_formula),
        _construction("CLIP's own anchors, gather without gradient", _clip_local, clip_formula),
        _barlow("an all-reduce whose backward sums", across.all_sum, right=True),
        _barlow("an in-place all-reduce", _in_place),
        _construction(
            "VICReg, variance and covariance over all ranks",
            lambda a, b: _vicreg(a, b, across.gather),
            _vicreg_formula,
            right=True,
        ),
        _construction("VICReg, variance and covariance per rank", _vicreg_formula, _vicreg_formula),
    ),
)
