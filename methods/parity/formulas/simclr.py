"""SimCLR's formula; and constructions of it, CLIP's, Barlow Twins' and VICReg's losses, right and wrong."""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.methods.parity.standard import TEMPERATURE, Construction, Loss, Standard, no_gradient, own_slice

Pairing = Callable[[Tensor, Tensor], Tensor]  # z1, z2 (n, D) -> loss
Gather = Callable[[Tensor], Tensor]  # this rank's rows or part -> those of all ranks; constructions differ in backward


def build(mode: Mode) -> Method:
    return SimCLR(ConvNet(4, mode), temperature=TEMPERATURE, dim=8)


def ntxent_formula(z1: Tensor, z2: Tensor) -> Tensor:
    """SimCLR, eq. 1 and algorithm 1: the mean over all 2N anchors of -log softmax over the 2N - 1 others."""
    return _anchors(torch.cat([z1, z2]), z1, z2, 0)


def _anchors(z: Tensor, all_z1: Tensor, all_z2: Tensor, offset: int) -> Tensor:
    """The mean loss of anchors z (2n, D), whose views are rows `offset` and following of all_z1 and all_z2 (N, D)."""
    n, total = len(z) // 2, len(all_z1)
    own_columns = torch.arange(offset, offset + n)
    own_columns = torch.cat([own_columns, own_columns + total])  # (2n,), each anchor's column among the 2N
    logits = F.normalize(z, dim=1) @ F.normalize(torch.cat([all_z1, all_z2]), dim=1).T / TEMPERATURE
    logits = logits.scatter(1, own_columns[:, None], -torch.inf)  # the anchor itself
    return F.cross_entropy(logits, (own_columns + total) % (2 * total))


def _own_anchors(z1: Tensor, z2: Tensor, gather: Gather) -> Tensor:
    return _anchors(torch.cat([z1, z2]), gather(z1), gather(z2), collectives.rank() * len(z1))


def clip_formula(z1: Tensor, z2: Tensor, temperature: float | Tensor = TEMPERATURE) -> Tensor:
    """Radford et al. 2021, figure 3."""
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature
    target = torch.arange(len(z1))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _clip_local(z1: Tensor, z2: Tensor) -> Tensor:
    u, v = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    target = torch.arange(len(u)) + collectives.rank() * len(u)
    by_u = F.cross_entropy(u @ no_gradient(v).T / TEMPERATURE, target)
    return (by_u + F.cross_entropy(v @ no_gradient(u).T / TEMPERATURE, target)) / 2


def _barlow_formula(z1: Tensor, z2: Tensor) -> Tensor:
    """Zbontar et al. 2021, arxiv.org/abs/2103.03230, eq. 1 and 2."""
    z1, z2 = z1 - z1.mean(0), z2 - z2.mean(0)
    return _redundancy(z1.T @ z2 / (z1.norm(dim=0)[:, None] * z2.norm(dim=0)))


def _redundancy(c: Tensor) -> Tensor:
    """Eq. 1, weighted as in the authors' code. c (D, D): the cross-correlation."""
    return (1 - c.diagonal()).square().sum() + 0.0051 * _off_diagonal(c).square().sum()


def _barlow_ranks(z1: Tensor, z2: Tensor, total: Gather) -> Tensor:
    """The whole loss on every rank, of this rank's part of the cross-correlation summed over ranks by `total`."""
    z1, z2 = (z - collectives.mean(z.mean(0)) for z in (z1, z2))
    z1, z2 = (z / collectives.all_reduce_sum(z.square().sum(0)).sqrt() for z in (z1, z2))
    return _redundancy(total(z1.T @ z2))


def _in_place(x: Tensor) -> Tensor:
    """An all-reduce that autograd does not see: to its backward, x is still this rank's part."""
    dist.all_reduce(x.detach())
    return x


def _vicreg_formula(z1: Tensor, z2: Tensor) -> Tensor:
    """Bardes et al. 2022, arxiv.org/abs/2105.04906, eq. 6, with the means and weights of the authors' code."""
    return _vicreg(z1, z2, lambda z: z)


def _vicreg(z1: Tensor, z2: Tensor, gather: Gather) -> Tensor:
    """The invariance of this rank's pairs; the variance and the covariance of all that `gather` returns."""
    z1, z2 = 100 * z1, 100 * z2  # the network's std is 0.01, and the covariance matters only for one near 1
    return 25 * F.mse_loss(z1, z2) + _spread(gather(z1)) + _spread(gather(z2))


def _spread(z: Tensor) -> Tensor:
    """One view's terms of eq. 1, the hinge of the variance, and of eq. 4, the covariance off the diagonal."""
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (len(z) - 1)
    hinge = F.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean()
    return 25 * hinge / 2 + _off_diagonal(covariance).square().sum() / z.shape[1]


def _off_diagonal(x: Tensor) -> Tensor:
    return x - x.diagonal().diag()


def _of_method(loss: Pairing) -> Loss:
    def loss_of_method(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        z1, z2 = z["z"].unbind(1)
        return loss(z1, z2)

    return loss_of_method


def _construction(name: str, loss: Pairing, formula: Pairing = ntxent_formula, right: bool = False) -> Construction:
    return Construction(name, _of_method(loss), _of_method(formula), right)


def _barlow(name: str, total: Gather, right: bool = False) -> Construction:
    loss: Pairing = lambda a, b: _barlow_ranks(a, b, total)  # noqa: E731
    return _construction(f"Barlow Twins, cross-correlation by {name}", loss, _barlow_formula, right)


STANDARD = Standard(
    build,
    _of_method(ntxent_formula),
    constructions=(
        _construction(
            "own anchors, gather whose backward sums", lambda a, b: _own_anchors(a, b, collectives.gather), right=True
        ),
        _construction("own anchors, gather whose backward keeps its slice", lambda a, b: _own_anchors(a, b, own_slice)),
        _construction("own anchors, gather without gradient", lambda a, b: _own_anchors(a, b, no_gradient)),
        _construction("whole loss on every rank, own slice", lambda a, b: ntxent_formula(own_slice(a), own_slice(b))),
        _construction("negatives of the own rank only", ntxent_formula),
        _construction("CLIP's own anchors, gather without gradient", _clip_local, clip_formula),
        _barlow("an all-reduce whose backward sums", collectives.all_reduce_sum, right=True),
        _barlow("an in-place all-reduce", _in_place),
        _construction(
            "VICReg, variance and covariance over all ranks",
            lambda a, b: _vicreg(a, b, collectives.gather),
            _vicreg_formula,
            right=True,
        ),
        _construction("VICReg, variance and covariance per rank", _vicreg_formula, _vicreg_formula),
    ),
)
