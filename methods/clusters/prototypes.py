"""Prototypes: the clusters of all training images as a method keeps them for an epoch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.methods import collectives
from kilobatch.methods.clusters.concentration import concentration
from kilobatch.methods.clusters.kmeans import Clusters


class Prototypes(nn.Module):
    """The clusters of `images` training images, `count` of them, in buffers that are the same on every rank:
    4 (images + count (D + 1)) bytes. dim: D."""

    assignment: Tensor  # (images,) int32: each image's cluster
    centroids: Tensor  # (K, D), scaled to length 1
    phi: Tensor  # (K,), a temperature for each

    def __init__(self, images: int, count: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("assignment", torch.zeros(images, dtype=torch.int32))
        self.register_buffer("centroids", torch.zeros(count, dim))
        self.register_buffer("phi", torch.ones(count))

    @torch.no_grad()
    def fill(self, assignment: Tensor, found: Clusters, temperature: float) -> None:
        """Takes over what k-means has found. assignment (images,): each image's cluster; temperature: the mean of
        phi."""
        self.assignment.copy_(assignment)
        self.centroids.copy_(F.normalize(found.centroids, dim=1))
        self.phi.copy_(concentration(found, temperature))

    def of(self, index: Tensor) -> Tensor:
        """index, of images -> their clusters, int64."""
        return self.assignment[index].long()


def gather_assignment(index: Tensor, found: Clusters, count: int) -> Tensor:
    """(count,) int32: the cluster of each of `count` rows, of which this rank has those of index (n,). Each rank sends
    an int32 for each of all rows."""
    cluster = torch.zeros(count, dtype=torch.int32, device=index.device)
    cluster[index] = found.assignment.int()
    return collectives.all_reduce_sum(cluster)
