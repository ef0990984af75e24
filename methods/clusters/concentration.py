"""Concentration of clusters, which is a temperature for each: Li et al. 2021, arxiv.org/abs/2005.04966, eq. 12."""

import torch
from torch import Tensor

from kilobatch.methods import collectives
from kilobatch.methods.clusters.kmeans import DISTANCE_GRID, Clusters

SMOOTH = 10  # alpha of eq. 12: so that small clusters do not get a large phi
LEAST = 0.01  # times the temperature


@torch.no_grad()
def concentration(found: Clusters, temperature: float) -> Tensor:
    """phi (K,) fp64, the same on every rank and for any ranks: as in the authors' main_pcl.py, run_kmeans.

    With d the distances of a cluster's n rows from its centroid, phi = mean(d) / log(n + 10); a cluster of one row or
    none gets the largest phi. Then all are clipped to their 10th and 90th percentiles, and scaled to the mean
    `temperature`. Where rows lie on their centroids, as those of a collapsed network do, phi would be 0, and a
    similarity divided by it infinite: it is at least LEAST * temperature, and all are `temperature` where all are 0.
    """
    roots = (found.distances.sqrt() * DISTANCE_GRID).round().long()
    sums = torch.zeros_like(found.sizes).index_add_(0, found.assignment, roots)
    total = collectives.all_reduce_sum(sums).double() / DISTANCE_GRID
    sizes = found.sizes.double()
    phi = (total / sizes.clamp_min(1) / (sizes + SMOOTH).log()).where(sizes > 1, 0)
    phi = phi.where(sizes > 1, phi.max())
    phi = phi.clamp(phi.quantile(0.1), phi.quantile(0.9))
    mean = phi.mean()
    return torch.where(mean > 0, phi * temperature / mean, temperature).clamp_min(LEAST * temperature)
