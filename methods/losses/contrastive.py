"""Contrastive losses that papers share: NT-Xent, CLIP's, InfoNCE, and the softmax over a memory bank."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function

from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.methods.losses.clip import CLIP
from kilobatch.methods.losses.info_nce import QueueLogSumExp, QueueNCE
from kilobatch.methods.losses.nt_xent import NTXent
from kilobatch.methods.memories.memory_bank import MemoryBank
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

    z1, z2: (n, D), two views of this rank's n images, the same n on every rank; normalised in this function. Any
    floating type: halves are computed in fp32. temperature: a number > 0, or a scalar tensor, which gets its gradient
    if learnt. queue: its keys, of all ranks, are further negatives of every anchor; they get no gradient.
    operands: the type in which matrix products are computed; their sums are fp32. Halves are faster on a processor that
    has them, and cost digits: tests/methods/losses/test_loss_kernels.py says how many.
    Returns the mean over this rank's 2n anchors, each against its positive and the other images' views of all ranks.
    The average over ranks of the parameters' gradients is the gradient of the mean over all anchors.

    Memory is O(n * D * ranks) and a few tiles. A rank sends its embeddings and a number per row, in the forward alone;
    with a sharded queue the embeddings once more and D + 1 sums of each, but no key.
    Raises UserError for views of different shapes, fewer than two images, a temperature that is not positive, and
    unequal n (on an accelerator in a process group's first call alone: see collectives.refuse_unequal).
    """
    _check_arguments("nt_xent", z1, z2, temperature)
    with torch.autocast(z1.device.type, enabled=False):
        u, root, bounded = _scaled_unit_rows(z1, z2, temperature)
        if queue is None:
            return NTXent.apply(u, bounded, operands)
        extra_lse = QueueLogSumExp.apply(u / root, queue.filled(), queue.sharded, bounded, operands)
        return NTXent.apply(u, bounded, operands, extra_lse)


def batch_info_nce(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """The mean over this rank's queries of -log softmax(q k / temperature) of the own key among those of the global
    batch: MoCo v3's eq. 1, NNCLR's eq. 3.

    q, k: (n, D) unit rows, a query and its key for each of this rank's n images, the same n on every rank. Keys with a
    gradient get that of all ranks' queries. Memory is O(n * n * ranks). Raises UserError for unequal n.
    """
    collectives.refuse_unequal(len(q), "queries", q.device)
    logits = q @ collectives.gather(k).T / temperature  # (n, W * n)
    return F.cross_entropy(logits, collectives.local_rows(len(q), q.device))


def clip_loss(z1: Tensor, z2: Tensor, temperature: float | Tensor, operands: Operands = "fp32") -> Tensor:
    """CLIP's loss (Radford et al. 2021, arxiv.org/abs/2103.00020, figure 3) over the batch of all ranks: the mean of
    the cross-entropies over rows and over columns of the similarities of z1's rows with z2's, of all ranks together.

    z1, z2: (n, D), the outputs of two towers for this rank's n pairs; otherwise, and in its refusals, as nt_xent. CLIP
    learns the logit scale t: its temperature is exp(-t), 0.07 at the start, and t is clipped to log(100) after each
    step.
    Returns the mean over this rank's 2n anchors, each against its positive and the others of the other tower, of all
    ranks. The average over ranks of the parameters' gradients is the gradient of the mean over all anchors.

    Memory is O(n * D * ranks) and one tile. A rank sends z2 and two numbers per row in the forward (three where the
    temperature may be small), and z2's gradient in the backward, which therefore has to run on every rank.
    """
    _check_arguments("clip_loss", z1, z2, temperature)
    with torch.autocast(z1.device.type, enabled=False):
        u, _, bounded = _scaled_unit_rows(z1, z2, temperature)
        return CLIP.apply(u, bounded, operands)


def _check_arguments(loss: str, z1: Tensor, z2: Tensor, temperature: float | Tensor) -> None:
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise UserError(f"{loss} takes two views of one shape (n, D); got {tuple(z1.shape)} and {tuple(z2.shape)}")
    if not isinstance(temperature, Tensor) and not (temperature > 0 and math.isfinite(temperature)):
        raise UserError(f"temperature {temperature} is not a positive number; SimCLR's is 0.1 on ImageNet")
    collectives.refuse_unequal(len(z1), "pairs of views", z1.device)
    if len(z1) * collectives.world_size() < 2:
        raise UserError(
            f"{loss} needs two images to have a negative; got {len(z1)} on {collectives.world_size()} ranks"
        )


def _scaled_unit_rows(z1: Tensor, z2: Tensor, temperature: float | Tensor) -> tuple[Tensor, float | Tensor, bool]:
    """Unit rows divided by the root of the temperature, (2n, D); that root; and True if no similarity can exceed
    LARGEST_EXPONENT."""
    z = torch.cat([z1, z2])
    z = z if z.dtype == torch.float64 else z.float()
    if isinstance(temperature, Tensor):
        root = temperature.to(z.dtype).sqrt()
        # A learnt temperature may become small. Its value is read only where the host need not wait for it; elsewhere
        # similarities count as unbounded.
        readable = temperature.device.type == "cpu" and not isinstance(temperature, FakeTensor)
        return _UnitRows.apply(z, 1.0) / root, root, readable and temperature.item() >= 1 / LARGEST_EXPONENT
    return _UnitRows.apply(z, temperature**-0.5), temperature**0.5, 1 / temperature <= LARGEST_EXPONENT


class _UnitRows(Function):
    """Scales the rows of z (N, D) to a length, in place; F.normalize would take five times the memory."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, length: float) -> Tensor:
        scale = length / torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min(1e-12)  # as in F.normalize
        z *= scale
        ctx.mark_dirty(z)
        ctx.save_for_backward(z, scale)
        ctx.length = length
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        u, scale = ctx.saved_tensors
        radial = torch.einsum("nd,nd->n", grads[0], u)[:, None] / -(ctx.length**2)  # no temporary of size (N, D)
        return torch.addcmul(grads[0], u, radial).mul_(scale), None


def bank_softmax(v: Tensor, index: Tensor, bank: MemoryBank, temperature: float) -> Tensor:
    """The loss of the exact non-parametric softmax over all images: Wu et al. 2018, section 3.1, eq. 2.

    v (n, D): unit rows of this rank's images index (n,), the same n on every rank. Returns the mean over n of
    -log( e^(v f_i / t) / sum over all images j of e^(v f_j / t) ), f the bank's rows; v alone gets a gradient. It takes
    one pass over this rank's rows, memory O(n * D * ranks) and one tile; a rank sends what info_nce with a sharded
    queue sends, and a fetch.
    """
    collectives.refuse_unequal(len(v), "images", v.device)
    is_local, positions = bank.locate(collectives.gather(index))
    own_rows = bank.fetch(index).to(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        return QueueNCE.apply(v, own_rows, bank.rows, True, temperature, None, positions.where(is_local, -1))


def info_nce(
    q: Tensor,
    k: Tensor,
    queue: Queue,
    temperature: float,
    extra_keys: Tensor | None = None,
    operands: Operands = "fp32",
) -> Tensor:
    """MoCo's loss (eq. 1): each query against its own key and the queue of all ranks.

    q, k: (n, D), unit rows, this rank's queries and their keys, the same n on every rank; halves are computed in fp32.
    extra_keys (n, S, D): keys of each query's own, in addition to the queue's. q alone gets a gradient. temperature: a
    number > 0. operands: the type in which products with the queue's keys are computed, as nt_xent's.
    Returns the mean over this rank's n queries of -log( e^(q k / t) / (e^(q k / t) + sum of e^(q key / t)) ), the sum
    over the queue and extra_keys.

    Memory is O(n * D * ranks) and one tile. With a sharded queue, a rank sends its queries, in an all-gather, and D + 1
    sums of each, in a reduce-scatter, but no key; with a replicated one it sends its keys at push alone:
    memories.options.bytes_sent counts them. Raises UserError for shapes that do not match, a temperature that is not
    positive, and unequal n (on an accelerator in a process group's first call alone).
    """
    if q.ndim != 2 or q.shape != k.shape or q.shape[1] != queue.keys.shape[1]:
        raise UserError(
            f"info_nce takes queries and keys (n, {queue.keys.shape[1]}); got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UserError(f"temperature {temperature} is not a positive number; MoCo's is 0.07, v2's 0.2")
    collectives.refuse_unequal(len(q), "queries", q.device)
    with torch.autocast(q.device.type, enabled=False):
        q = q if q.dtype == torch.float64 else q.float()
        extra_keys = None if extra_keys is None else extra_keys.detach().to(q.dtype)
        keys, k = queue.filled(), k.detach().to(q.dtype)
        return QueueNCE.apply(q, k, keys, queue.sharded, temperature, extra_keys, None, operands)
