"""Contrast of queries with the prototypes of clusters: Li et al. 2021, arxiv.org/abs/2005.04966, eq. 11."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.tensor_rng import PROTOTYPES, child
from kilobatch.methods import collectives
from kilobatch.methods.clusters.prototypes import Prototypes


def prototype_nce(q: Tensor, prototypes: Prototypes, batch: Batch, level: int, negatives: int | None) -> Tensor:
    """The mean over this rank's queries of -log softmax_c(q c / phi_c) of the prototype of the query's own image.

    q (n, D): unit rows of this rank's samples, the same n on every rank. Candidates c are the prototypes of the global
    batch's images and `negatives` others, or as many as there are, each once; None: all prototypes. Those others are
    drawn anew for each step and `level`, the same for all queries and on every rank. q alone gets a gradient.

    A rank sends two numbers for each of its images, or nothing for None. Memory is O(n * candidates).
    """
    own = prototypes.of(batch.index)  # (n,)
    with torch.autocast(q.device.type, enabled=False):
        if negatives is None:
            rows, phi = prototypes.centroids.to(q.dtype), prototypes.phi.to(q.dtype)
            return F.cross_entropy(q @ rows.T / phi, own)
        columns, counts, first = candidates(own, batch.keys, len(prototypes.phi), level, negatives)
        rows, phi = prototypes.centroids[columns].to(q.dtype), prototypes.phi[columns].to(q.dtype)
        logits = (q @ rows.T / phi).masked_fill(~counts, -torch.inf)
        return F.cross_entropy(logits, first[own])


def candidates(own: Tensor, keys: Tensor, count: int, level: int, negatives: int) -> tuple[Tensor, Tensor, Tensor]:
    """The prototypes that a step's queries of all ranks are compared with: numbers (N + r,), r at most `negatives`; a
    mask of those that count, as each does once; and of each prototype (K,) the first place, N where it has no image.

    own (n,): the prototypes of this rank's images; keys (n,) int64: of its samples; count: K.
    """
    gathered = collectives.gather(torch.stack([own, keys], 1))
    everyone, step_key = gathered[:, 0], gathered[:1, 1]  # the key of the batch's first sample stands for the step
    place = torch.arange(len(everyone), device=own.device)
    first = place.new_full((count,), len(everyone)).scatter_reduce_(0, everyone, place, "amin")
    is_of_batch = first < len(everyone)
    draws = child(step_key, PROTOTYPES, level, torch.arange(count, device=own.device))
    # The least of random numbers are a random set. The batch's own come last, and do not count if there are too few.
    last = torch.iinfo(torch.int64).max
    drawn = draws.masked_fill(is_of_batch, last).topk(min(negatives, count), largest=False).indices
    return torch.cat([everyone, drawn]), torch.cat([first[everyone] == place, ~is_of_batch[drawn]]), first
