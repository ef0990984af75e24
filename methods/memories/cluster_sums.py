"""Sums of rows by cluster over an epoch, which ranks add up once."""

from collections.abc import Callable

import torch
from torch import Tensor

from kilobatch.methods import collectives
from kilobatch.methods.method import Memory

GRID = 2**40  # sums are of multiples of 1 / GRID: for numbers of at most 1, up to 2^22 rows of each cluster


class ClusterSums(Memory):
    """The sum and the number of rows of each cluster since the last clear(), of this rank's own rows.

    Sums are of integers, and so the same for any order, and for any ranks.
    """

    sums: Tensor  # (K, D) int64
    counts: Tensor  # (K,) int64

    def __init__(self, clusters: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(clusters, dim, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(clusters, dtype=torch.int64))

    @torch.no_grad()
    def add(self, rows: Tensor, cluster: Tensor) -> None:
        """rows (n, D), of numbers of at most 1; cluster (n,) int64."""
        self.sums.index_add_(0, cluster, (rows.double() * GRID).round().long())
        self.counts.index_add_(0, cluster, torch.ones_like(cluster))

    @torch.no_grad()
    def total(self) -> tuple[Tensor, Tensor]:
        """Sums (K, D) fp64 and counts (K,) of all ranks. Each sends K (D + 1) numbers of 8 bytes."""
        both = collectives.all_reduce_sum(torch.cat([self.sums, self.counts[:, None]], 1))
        return both[:, :-1].double() / GRID, both[:, -1]

    def clear(self) -> None:
        self.sums.zero_()
        self.counts.zero_()

    def reshard(self, ranks: int, held: Callable[[str, int], Tensor]) -> None:
        """Gives rank 0 the sums of all ranks of the checkpoint, and the others none."""
        self.clear()
        if collectives.rank() == 0:
            for r in range(ranks):
                self.sums += held("sums", r).to(self.sums)
                self.counts += held("counts", r).to(self.counts)
