"""Distillation by similarity: a student compares an image with a queue of the teacher's keys as the teacher does."""

import torch
from torch import Tensor

from kilobatch.methods.losses.info_nce import QueueLogSumExp
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.options import LARGEST_EXPONENT, Operands


def similarity_distillation(
    z: Tensor,
    t: Tensor,
    queue: Queue,
    temperature: float,
    teacher_temperature: float,
    own: bool = True,
    operands: Operands = "fp32",
) -> Tensor:
    """The mean over this rank's images of SEED's cross-entropy (Fang et al. 2021, arxiv.org/abs/2101.04731, eq. 4-6):
    -sum_j p_j log softmax_j(z d / tau), p = softmax(t d / tau_T), over the keys d_j of the whole queue and, with `own`,
    the teacher's own row.

    z, t (n, D): unit rows of this rank's n images by student and teacher, the same n on every rank. own False:
    CompRess's form with one queue (Koohpayegani et al. 2020, arxiv.org/abs/2010.14713).

    The sum over j is linear in log softmax, so that it needs no probability of its own, only the mean key m = sum_j p_j
    d_j: L = logsumexp_j(z d_j / tau) - z m / tau. Both come by one pass over the keys that each rank holds, and no
    matrix of all images and keys is made.
    """
    with torch.autocast(z.device.type, enabled=False):
        scaled, taught = z / temperature, t.to(z.dtype) / teacher_temperature
        m, lse_t = _mean_key(taught, queue, teacher_temperature, operands)
        lse = QueueLogSumExp.apply(scaled, queue.filled(), queue.sharded, _bounded(temperature), operands)
        if own:
            similarity = (taught * t).sum(1)
            p = (similarity - torch.logaddexp(lse_t, similarity)).exp()[:, None]  # of the teacher's own row
            m = (1 - p) * m + p * t
            lse = torch.logaddexp(lse, (scaled * t).sum(1))
        return (lse - (scaled * m).sum(1)).mean()


def _bounded(temperature: float) -> bool:
    return 1 / temperature <= LARGEST_EXPONENT


def _mean_key(taught: Tensor, queue: Queue, temperature: float, operands: Operands) -> tuple[Tensor, Tensor]:
    """The keys' mean by the softmax of their similarities, (n, D), which is the gradient of the log-sum-exp, and that,
    (n,)."""
    with torch.enable_grad():
        rows = taught.detach().requires_grad_()
        lse = QueueLogSumExp.apply(rows, queue.filled(), queue.sharded, _bounded(temperature), operands)
        (mean,) = torch.autograd.grad(lse.sum(), rows)
    return mean, lse.detach()
