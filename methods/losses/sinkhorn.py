"""Balanced assignments of samples to prototypes over ranks, by the Sinkhorn-Knopp iteration: Cuturi 2013, for SwAV.

With M = exp((s - 1) / epsilon), whose elements lie in [e^(-2 / epsilon), 1] for cosines s, each round is
u = 1 / (M^T v summed over ranks), v = 1 / (M u), from v = 1, and the assignments are q = M u v. That is the authors'
division of rows and columns in turn (facebookresearch/swav, main_swav.py, distributed_sinkhorn), without the factors
that cancel: per round K numbers cross ranks, and nothing of the samples.
"""

import torch
from torch import Tensor

from kilobatch.methods import collectives
from kilobatch.methods.losses.options import SINKHORN_EPSILON


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, rounds: int, more: Tensor | None = None) -> Tensor:
    """Assignments (..., n, K) of this rank's samples, whose rows sum to 1.

    scores: (..., n, K) cosines with the prototypes, the same K on every rank; more: (..., m, K), those of further
    samples that are balanced along and not returned, such as a queue's. epsilon: of the entropy, SINKHORN_EPSILON or
    more. Computed in fp32, or fp64 where the scores are. O(n K) memory.
    """
    assert epsilon >= SINKHORN_EPSILON, epsilon
    own = scores.shape[-2]
    whole = scores if more is None else torch.cat([scores, more], -2)
    m = ((whole if whole.dtype == torch.float64 else whole.float()) - 1).div(epsilon).exp_()
    u, v = m.new_ones(m.shape[-1]), m.new_ones(*m.shape[:-1], 1)
    for _ in range(rounds):
        u = 1 / collectives.all_reduce_sum((m * v).sum(-2, keepdim=True))  # (..., 1, K)
        v = 1 / (m * u).sum(-1, keepdim=True)  # (..., n + m, 1)
    return (m * u * v)[..., :own, :]
