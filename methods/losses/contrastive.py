"""Equations that papers share."""

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function

from kilobatch.data.errors import Refusal
from kilobatch.methods import collectives as across
from kilobatch.methods.losses.clip import CLIP
from kilobatch.methods.losses.info_nce import QueueLogSumExp, QueueNCE
from kilobatch.methods.losses.nt_xent import NTXent
from kilobatch.methods.memories.memory_bank import Bank
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.options import LARGEST_EXPONENT, Operands


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    queue: Queue | None = None,
    operands: Operands = "fp32",
) -> Tensor:
    """SimCLR's loss (Chen et al. 2020, eq. 1) over the batch of all ranks.

    z1, z2: (n, D), two views of this rank's n images, the same n on every rank; normalised here. Any floating type:
    halves are computed in fp32. temperature: a number > 0, or a scalar tensor, which gets its gradient if learnt.
    queue: whose keys, of all ranks, are further negatives of every anchor; they get no gradient.
    operands: what the matrix products are made of, their sums being fp32. Halves are faster where a processor has them
    and cost digits: tests/methods/losses/test_loss_kernels.py states how many.
    Returns the mean over this rank's 2n anchors, each against its positive and the other images' views of all ranks.
    The average over ranks of the parameters' gradients is the gradient of the mean over all anchors.

    Memory is O(n * D * ranks) and a few tiles; sent are the embeddings and a number per row, in the forward alone; with
    a sharded queue the embeddings once more and D + 1 sums of each, but no key.
    Raises Refusal for shapes that do not pair, fewer than two images, a temperature that is not positive, and unequal n
    (on an accelerator in a process group's first call alone: see across.refuse_unequal).
    """
    _refuse("nt_xent", z1, z2, temperature)
    with torch.autocast(z1.device.type, enabled=False):
        u, root, bounded = _scaled(z1, z2, temperature)
        if queue is None:
            return NTXent.apply(u, bounded, operands)
        further = QueueLogSumExp.apply(u / root, queue.filled(), queue.sharded, bounded, operands)
        return NTXent.apply(u, bounded, operands, further)


def clip_loss(z1: Tensor, z2: Tensor, temperature: float | Tensor, operands: Operands = "fp32") -> Tensor:
    """CLIP's loss (Radford et al. 2021, arxiv.org/abs/2103.00020, figure 3) over the batch of all ranks: the mean of
    the cross-entropies over rows and over columns of the similarities of z1's rows with z2's, all ranks' n as one.

    z1, z2: (n, D), what two towers make of this rank's n pairs; else as nt_xent's, with its refusals. CLIP learns the
    logit scale t: its temperature is exp(-t), started at 0.07, t cut off at log(100) after each step.
    Returns the mean over this rank's 2n anchors, each against its positive and the others of the other tower, of all
    ranks. The average over ranks of the parameters' gradients is the gradient of the mean over all anchors.

    Memory is O(n * D * ranks) and one tile; sent are z2 and two numbers per row in the forward (three where the
    temperature may be small), and z2's gradient in the backward: every rank has to go through it.
    """
    _refuse("clip_loss", z1, z2, temperature)
    with torch.autocast(z1.device.type, enabled=False):
        u, _, bounded = _scaled(z1, z2, temperature)
        return CLIP.apply(u, bounded, operands)


def _refuse(loss: str, z1: Tensor, z2: Tensor, temperature: float | Tensor) -> None:
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise Refusal(f"{loss} takes two views of one shape (n, D); got {tuple(z1.shape)} and {tuple(z2.shape)}")
    if not isinstance(temperature, Tensor) and not (temperature > 0 and math.isfinite(temperature)):
        raise Refusal(f"temperature {temperature} is not a positive number; SimCLR's is 0.1 on ImageNet")
    across.refuse_unequal(len(z1), "pairs of views", z1.device)
    if len(z1) * across.size() < 2:
        raise Refusal(f"{loss} needs two images to have a negative; got {len(z1)} on {across.size()} ranks")


def _scaled(z1: Tensor, z2: Tensor, temperature: float | Tensor) -> tuple[Tensor, float | Tensor, bool]:
    """(2n, D): unit rows over the root of the temperature; that root; whether no similarity is beyond
    LARGEST_EXPONENT."""
    z = torch.cat([z1, z2])
    z = z if z.dtype == torch.float64 else z.float()
    if isinstance(temperature, Tensor):
        root = temperature.to(z.dtype).sqrt()
        # Learnt, it may grow small: the careful way, but where reading it does not make the host wait.
        known = temperature.device.type == "cpu" and not isinstance(temperature, FakeTensor)
        return _Directions.apply(z, 1.0) / root, root, known and temperature.item() >= 1 / LARGEST_EXPONENT
    return _Directions.apply(z, temperature**-0.5), temperature**0.5, 1 / temperature <= LARGEST_EXPONENT


class _Directions(Function):
    """z (N, D), which is overwritten -> its rows at the given length; F.normalize would take five times the memory."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, length: float) -> Tensor:
        shrink = length / torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min(1e-12)  # as F.normalize's
        z *= shrink
        ctx.mark_dirty(z)
        ctx.save_for_backward(z, shrink)
        ctx.length = length
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        u, shrink = ctx.saved_tensors
        along = torch.einsum("nd,nd->n", grads[0], u)[:, None] / -(ctx.length**2)  # without a product of all numbers
        return torch.addcmul(grads[0], u, along).mul_(shrink), None


def softmax(v: Tensor, index: Tensor, bank: Bank, temperature: float) -> Tensor:
    """The non-parametric softmax over all images, exact.

    v (n, D): unit rows, of the images index (n,), this rank's, the same n on every rank. Returns the mean over n of
    -log( e^(v f_i / t) / sum over all images j of e^(v f_j / t) ), f the bank's rows; the gradient goes to v alone. One
    pass over this rank's rows, memory O(n * D * ranks) and one tile; sent as by a sharded queue's info_nce, and a
    fetch.
    """
    across.refuse_unequal(len(v), "images", v.device)
    mine, places = bank.mine(across.gather(index))
    own = bank.fetch(index).to(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        return QueueNCE.apply(v, own, bank.rows, True, temperature, None, places.where(mine, -1))


def info_nce(
    q: Tensor,
    k: Tensor,
    queue: Queue,
    temperature: float,
    further: Tensor | None = None,
    operands: Operands = "fp32",
) -> Tensor:
    """MoCo's loss (eq. 1): each query against its own key and the queue of all ranks.

    q, k: (n, D), unit rows, this rank's queries and their keys, the same n on every rank; halves are computed in fp32.
    further (n, S, D): keys of each query's own, beside the queue's. The gradient goes to q alone. temperature: a number
    > 0. operands: what the products with the queue's keys are made of, as nt_xent's.
    Returns the mean over this rank's n queries of -log( e^(q k / t) / (e^(q k / t) + sum of e^(q key / t)) ), the sum
    over the queue and further.

    Memory is O(n * D * ranks) and one tile. For a sharded queue the queries are sent, in an all-gather, and D + 1 sums
    of each, in a reduce-scatter, but no key; for a replicated one nothing here, but the keys at push: bytes are counted
    by memory_options.sent. Raises Refusal for shapes that do not fit, a temperature that is not positive, and unequal n
    (on an accelerator in a process group's first call alone).
    """
    if q.ndim != 2 or q.shape != k.shape or q.shape[1] != queue.keys.shape[1]:
        raise Refusal(
            f"info_nce takes queries and keys (n, {queue.keys.shape[1]}); got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise Refusal(f"temperature {temperature} is not a positive number; MoCo's is 0.07, v2's 0.2")
    across.refuse_unequal(len(q), "queries", q.device)
    with torch.autocast(q.device.type, enabled=False):
        q = q if q.dtype == torch.float64 else q.float()
        further = None if further is None else further.detach().to(q.dtype)
        keys, k = queue.filled(), k.detach().to(q.dtype)
        return QueueNCE.apply(q, k, keys, queue.sharded, temperature, further, None, operands)
