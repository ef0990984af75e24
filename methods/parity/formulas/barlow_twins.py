"""Barlow Twins' formula; and constructions that lose a part of its gradient."""

from collections.abc import Callable

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.barlow_twins import BarlowTwins
from kilobatch.methods.parity.standard import Construction, Loss, Standard, own_slice

Gather = Callable[[Tensor], Tensor]
OFF_DIAGONAL, EPSILON = 0.3, 1e-5  # the weight is such that both terms count at 8 dimensions


def build(mode: Mode) -> Method:
    return BarlowTwins(ConvNet(4, mode), off_diagonal=OFF_DIAGONAL, dim=8, hidden=32)


def standardised(z: Tensor) -> Tensor:
    """The authors' last norm, main.py: BatchNorm1d without parameters."""
    return F.batch_norm(z, None, None, training=True, eps=EPSILON)


def redundancy(c: Tensor) -> Tensor:
    """Eq. 1. c (D, D): the cross-correlation."""
    off = c - c.diagonal().diag()
    return (1 - c.diagonal()).square().sum() + OFF_DIAGONAL * off.square().sum()


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """Zbontar et al., eq. 1 and 2, standardised as by the authors; all samples in one process."""
    z1, z2 = z["z"].unbind(1)
    return redundancy(standardised(z1).T @ standardised(z2) / len(z1))


def over_ranks(total: Gather, standardise: Gather) -> Loss:
    """The loss on every rank, of this rank's part of the cross-correlation, which `total` sums over ranks."""

    def loss(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        z1, z2 = (standardise(view) for view in z["z"].unbind(1))
        return redundancy(total(z1.T @ z2) / (len(z1) * collectives.world_size()))

    return loss


def by_all_ranks(z: Tensor) -> Tensor:
    """Standardised by sums over ranks whose backward sums, too."""
    z = z - collectives.mean(z.mean(0))
    return z / (collectives.mean(z.square().mean(0)) + EPSILON).sqrt()


def in_place(x: Tensor) -> Tensor:
    """An all-reduce that autograd does not see, as in the authors' code and solo-learn's."""
    dist.all_reduce(x.detach())
    return x


STANDARD = Standard(
    build,
    formula,
    samples=48,  # as for VICReg
    constructions=(
        Construction(
            "cross-correlation by an all-reduce whose backward sums",
            over_ranks(collectives.all_reduce_sum, by_all_ranks),
            formula,
            True,
        ),
        Construction("cross-correlation by an in-place all-reduce", over_ranks(in_place, by_all_ranks), formula, False),
        Construction(
            "standardised by the own rank's samples",
            over_ranks(collectives.all_reduce_sum, standardised),
            formula,
            False,
        ),
        Construction("cross-correlation of the own rank's samples", formula, formula, False),
        Construction(
            "whole loss on every rank, own slice",
            lambda method, z, t, batch: formula(method, {"z": own_slice(z["z"])}, t, batch),
            formula,
            False,
        ),
    ),
)
