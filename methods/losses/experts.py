"""Log-likelihoods of a mixture of experts, each of which tells images apart against a queue: MiCE's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.methods.losses.info_nce import QueueLogSumExp
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.options import LARGEST_EXPONENT, Operands


def expert_log_likelihoods(
    q: Tensor, v: Tensor, queue: Queue, temperature: float, operands: Operands = "fp32"
) -> Tensor:
    """log Phi (n, K): MoCo's eq. 1 under each expert, of its own query, key and part of the queue.

    q (n, K, D): this rank's queries of each expert, of length 2 at most, the same n on every rank; v (n, K, D): their
    unit keys, which get no gradient. queue: its rows are the K unit keys of an image, K * D numbers. Memory is that of
    info_nce for one expert after the other; a rank sends, K times, what that sends. Raises UserError for unequal n.
    """
    if q.shape != v.shape or q[0].numel() != queue.keys.shape[1]:
        raise UserError(
            f"queries and keys of all experts are (n, K, D) with K * D = {queue.keys.shape[1]}; got {tuple(q.shape)} "
            f"and {tuple(v.shape)}"
        )
    collectives.refuse_unequal(len(q), "queries", q.device)
    with torch.autocast(q.device.type, enabled=False):
        scaled = (q if q.dtype == torch.float64 else q.float()) / temperature
        positive = (scaled * v.detach().to(scaled.dtype)).sum(2)  # (n, K)
        keys = queue.filled().unflatten(1, q.shape[1:])  # (m, K, D)
        bounded = 2 / temperature <= LARGEST_EXPONENT
        each = zip(scaled.unbind(1), keys.unbind(1), strict=True)
        lse = [QueueLogSumExp.apply(rows, of, queue.sharded, bounded, operands) for rows, of in each]
        return F.logsigmoid(positive - torch.stack(lse, 1))


def simplex(count: int, dim: int) -> Tensor:
    """(K, D): K unit vectors whose pairwise products are all -1 / (K - 1), the least that is possible.

    Pang et al. 2018, arxiv.org/abs/1711.06740, algorithm 1, in closed form: vector k ends at coordinate k. Raises
    UserError where D is less than K - 1.
    """
    if dim < count - 1:
        raise UserError(f"{count} equally distant directions need {count - 1} dimensions; method.dim is {dim}")
    vectors = torch.zeros(count, max(dim, count), dtype=torch.float64)
    for k in range(count - 1):
        left = count - 1 - k  # vectors that follow
        vectors[k, k] = (count / (count - 1) * left / (left + 1)) ** 0.5
        vectors[k + 1 :, k] = -vectors[k, k] / left
    return vectors[:, :dim].float()
