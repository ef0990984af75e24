"""SwAV's formula, with the authors' divisions of a matrix in turn and all pairs of views; and wrong constructions."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.swav import SwAV
from kilobatch.methods.parity.standard import Construction, GroupShape, Standard, own_slice, without_bias

TAU, EPSILON, ROUNDS, PROTOTYPES = 0.1, 0.05, 3, 12


def build(mode: Mode) -> Method:
    return without_bias(SwAV(ConvNet(4, mode), prototypes=PROTOTYPES, dim=8, hidden=32), "head.3.bias")


def balanced(scores: Tensor) -> Tensor:
    """Caron et al., section 3.1, of all samples in one process: scores (N, K) -> (N, K). The authors' code, in which
    rows and columns are divided in turn, and every sum is written out."""
    q = (scores.detach() / EPSILON).exp().T
    q = q / q.sum()
    for _ in range(ROUNDS):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def swapped(
    z: Tensor,
    prototypes: Tensor,
    whole: Tensor | None = None,
    first: int = 0,
    queues: tuple[Tensor, ...] = (),
) -> Tensor:
    """Eq. 2 for every pair of a large view and another one. z (n, V, D); whole (N, 2, D): the large views of all
    samples, of which z's are rows `first` and following; None: z's. queues: (m, D) further rows for either."""
    z, c = F.normalize(z, dim=-1), F.normalize(prototypes, dim=-1)
    large = z[:, :2] if whole is None else F.normalize(whole, dim=-1)
    total, views = z.new_zeros(()), z.shape[1]
    for i in range(2):
        rows = torch.cat([large[:, i], *queues[i : i + 1]])
        q = balanced(rows @ c.T)[first : first + len(z)]
        for v in range(views):
            if v != i:
                p = (z[:, v] @ c.T / TAU).exp()
                total = total - (q * (p / p.sum(1, keepdim=True)).log()).sum(1).mean()
    return total / (2 * (views - 1))


def _prototypes(method: Method) -> Tensor:
    return cast(SwAV, method).prototypes.weight


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    return swapped(z["z"], _prototypes(method))


def _gathered(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    large = collectives.gather(z["z"][:, :2].detach())
    return swapped(z["z"], _prototypes(method), large, collectives.rank() * len(z["z"]))


STANDARD = Standard(
    build,
    formula,
    samples=60,
    groups=(GroupShape(2, 12), GroupShape(3, 8)),
    constructions=(
        Construction("scores of all ranks, balanced on every rank", _gathered, formula, True),
        Construction("balanced by each rank alone", formula, formula, False),
        Construction(
            "whole loss on every rank, own slice",
            lambda method, z, t, batch: swapped(own_slice(z["z"]), _prototypes(method)),
            formula,
            False,
        ),
    ),
)
