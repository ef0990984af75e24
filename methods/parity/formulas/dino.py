"""DINO's formula, pair by pair, and its centre after a step; and wrong constructions."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.heads import BottleneckHead
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.dino import DINO
from kilobatch.methods.parity.standard import Construction, GroupShape, Standard, own_slice

TAU, TEACHER_TAU, CENTER_MOMENTUM, PROTOTYPES = 0.1, 0.05, 0.5, 12


def build(mode: Mode) -> Method:
    """With a student's head that differs from the teacher's, lengths of prototypes, and a centre."""
    method = DINO(
        ConvNet(4, mode),
        teacher_temperature=0.07,
        warmup_temperature=TEACHER_TAU,
        warmup_epochs=3,  # the batch is of the first epoch
        center_momentum=CENTER_MOMENTUM,
        prototypes=PROTOTYPES,
        dim=8,
        hidden=32,
        unit_prototypes=False,
    )
    with torch.no_grad():
        for p in method.head.parameters():  # the authors' weights are so small that biases of this size would be all
            p.copy_(torch.randn_like(p) / 4 if p.ndim > 1 else p)
        method.get_parameter("head.prototypes.length").abs_().add_(0.5)
        method.center.copy_(torch.randn(PROTOTYPES) / 4)
    return method


def scores(rows: Tensor, method: Method, student: bool) -> Tensor:
    """g (..., K): of a linear layer whose weight is split into length and direction."""
    dino = cast(DINO, method)
    head = dino.head if student else cast(BottleneckHead, dino.teacher.network.get_submodule("1"))
    weight, length = head.prototypes.weight, cast(Tensor, head.prototypes.length)
    return rows @ (length * weight / weight.square().sum(1, keepdim=True).sqrt()).T


def cross_entropies(z: Tensor, g_t: Tensor, center: Tensor, method: Method, own: bool = False) -> Tensor:
    """Eq. 3: the mean over samples and pairs of a view of the teacher and another view of the student. g_t (n, T, K):
    the teacher's scores. own: a view is compared with itself, too."""
    p, q = F.softmax(scores(z, method, True) / TAU, 2), F.softmax((g_t - center) / TEACHER_TAU, 2).detach()
    pairs = [(i, v) for i in range(q.shape[1]) for v in range(p.shape[1]) if own or i != v]
    return torch.stack([-(q[:, i] * p[:, v].log()).sum(1).mean() for i, v in pairs]).mean()


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    return cross_entropies(z["z"], scores(t["z"], method, False), cast(DINO, method).center, method)


def moved(center: Tensor, g_t: Tensor) -> Tensor:
    """Eq. 4, of the teacher's scores (n, T, K)."""
    return CENTER_MOMENTUM * center + (1 - CENTER_MOMENTUM) * g_t.mean((0, 1)).detach()


def held(method: Method) -> Tensor:
    """This rank's share of the centre, which all ranks hold, as rows of one number."""
    return cast(DINO, method).center.chunk(collectives.world_size())[collectives.rank()][:, None]


def remembered(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    return moved(cast(DINO, method).center, scores(t["z"], method, False))[:, None]


def _next(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """The loss with the centre as it is after the step, in one process."""
    g_t = scores(t["z"], method, False)
    return cross_entropies(z["z"], g_t, moved(cast(DINO, method).center, g_t), method)


def _next_of_all(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    g_t = scores(t["z"], method, False)
    return cross_entropies(z["z"], g_t, moved(cast(DINO, method).center, collectives.gather(g_t)), method)


def _all_views(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    rows = [cast(DINO, method).teacher(views.flatten(0, 1)).unflatten(0, views.shape[:2]) for views in batch.views]
    return cross_entropies(z["z"], scores(torch.cat(rows, 1), method, False), cast(DINO, method).center, method)


def _of_all_ranks(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    g_t = scores(collectives.gather(t["z"]), method, False)
    return cross_entropies(own_slice(z["z"]), g_t, cast(DINO, method).center, method)


def _own_pairs(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    g_t = scores(t["z"], method, False)
    return cross_entropies(z["z"], g_t, cast(DINO, method).center, method, own=True)


def _no_center(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    g_t = scores(t["z"], method, False)
    return cross_entropies(z["z"], g_t, torch.zeros_like(g_t[0, 0]), method)


STANDARD = Standard(
    build,
    formula,
    samples=60,
    groups=(GroupShape(2, 12), GroupShape(3, 8)),
    constructions=(
        Construction("the next centre, of all ranks' scores", _next_of_all, _next, True),
        Construction("the next centre, of the own rank's scores", _next, _next, False),
        Construction("no centring", _no_center, formula, False),
        Construction("the teacher sees small views as well", _all_views, formula, False),
        Construction("a view is compared with itself, too", _own_pairs, formula, False),
        Construction("whole loss on every rank, own slice", _of_all_ranks, formula, False),
    ),
    held=held,
    remembered=remembered,
)
