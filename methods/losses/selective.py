"""Contrasts with selected negatives: Guo et al. 2022, arxiv.org/abs/2202.00455, HCSC.

A negative that is likely to be of the query's own cluster is left out by chance. As in the authors' code
(gyfastas/HCSC, hcsc/hcsc.py), its similarity is then 0, so that it keeps a 1 in the denominator, without a gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.tensor_rng import SELECTED_KEYS, SELECTED_PROTOTYPES, child, uniforms
from kilobatch.methods import collectives
from kilobatch.methods.clusters.hierarchy import Hierarchy
from kilobatch.methods.memories.numbered_queue import NumberedQueue

LEAST_PHI = 1e-3  # that a similarity with a prototype is divided by, in the authors' code
MOST = 0.999  # the largest probability that a negative is kept with
LEAST = 1e-4  # the least, for a prototype
KEYS = 1024  # whose similarities with all prototypes are computed at a time


def selected_keys_nce(
    q: Tensor, k: Tensor, queue: NumberedQueue, hierarchy: Hierarchy, batch: Batch, temperature: float
) -> Tensor:
    """The sum over levels of the mean over this rank's queries of -log( e^(q k / t) / (e^(q k / t) + sum_j e^s_j) ),
    with s_j = q k_j / t for a kept key of the queue, and 0 for one that is left out.

    At a level with prototypes c, key j is kept for a query with the probability that it is not of the query's own
    cluster, 1 - softmax_c(k_j c / phi_c)[own], at most MOST. Chance comes from the step, the sample, the level and the
    key's number. q, k (n, D): unit rows, the same n on every rank; temperature: 1 / 40 or more.

    q alone gets a gradient.
    With a sharded queue a rank sends its queries and gets their gradients, and a number for each query and level in
    both directions, but no key. Memory is O(n * ranks * m), m the keys that a rank holds.
    """
    collectives.refuse_unequal(len(q), "queries", q.device)
    with torch.autocast(q.device.type, enabled=False):
        q = q if q.dtype == torch.float64 else q.float()
        keys, numbers = queue.filled().to(q.dtype), queue.filled_numbers()
        spread = collectives.gather if queue.sharded else _same
        similarities = spread(q) @ keys.T / temperature  # (N, m), or (n, m)
        negated = (q * k.detach().to(q.dtype)).sum(1) / -temperature
        losses: list[Tensor] = []
        for level, prototypes in enumerate(hierarchy.prototypes()):
            c, phi = prototypes.centroids.to(q.dtype), prototypes.phi.to(q.dtype).clamp_min(LEAST_PHI)
            lse = torch.cat([(part @ c.T / phi).logsumexp(1) for part in keys.split(KEYS)])  # (m,)
            own = spread(prototypes.of(batch.index))
            is_own = (c[own] @ keys.T / phi[own, None] - lse).exp_()  # the probability that a key is of that cluster
            chance = uniforms(child(spread(batch.keys), SELECTED_KEYS, level)[:, None], numbers)
            kept = chance < (1 - is_own).clamp(0, MOST)
            sums = similarities.where(kept, 0).exp().sum(1)
            if queue.sharded:
                sums = collectives.all_reduce_sum(sums)[collectives.local_rows(len(q), q.device)]
            losses.append((sums * negated.exp()).log1p().mean())
        return torch.stack(losses).sum()


def selected_prototypes_nce(q: Tensor, hierarchy: Hierarchy, batch: Batch) -> Tensor:
    """The mean over levels and this rank's queries of -log softmax_c(s_c)[own], over all prototypes of a level: s_c =
    q c / phi_c for the own and for those that are kept, and 0 for one that is left out.

    Below the highest level, with prototypes u above, c is kept with the probability that it is not of the cluster that
    the own one is in, 1 - softmax_u(c u / phi_u)[parent], from LEAST to MOST. Chance comes from the step, the sample,
    the level and the prototype. q alone gets a gradient, and nothing is sent.
    """
    losses: list[Tensor] = []
    levels = hierarchy.prototypes()
    with torch.autocast(q.device.type, enabled=False):
        q = q if q.dtype == torch.float64 else q.float()
        for level, prototypes in enumerate(levels):
            own, c = prototypes.of(batch.index), prototypes.centroids.to(q.dtype)
            logits = q @ c.T / prototypes.phi.to(q.dtype)
            if level + 1 < len(levels):
                above = levels[level + 1]
                shares = (c @ above.centroids.to(q.dtype).T / above.phi.to(q.dtype)).softmax(1)  # (K, K above)
                keep = (1 - shares.T[hierarchy.parents(level)[own]]).clamp(LEAST, MOST)  # (n, K)
                place = torch.arange(len(c), device=q.device)
                chance = uniforms(child(batch.keys, SELECTED_PROTOTYPES, level)[:, None], place)
                logits = logits.where((chance < keep) | (place == own[:, None]), 0)
            losses.append(F.cross_entropy(logits, own))
    return torch.stack(losses).mean()


def _same(x: Tensor) -> Tensor:
    return x
