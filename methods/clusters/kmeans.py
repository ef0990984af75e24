"""k-means over ranks: the same to the bit for any number of ranks, any tile and any order of sums.

Rows and centroids are rounded to multiples of 2^-23. Then a product of two of their numbers is a multiple of 2^-46, and
as lengths are at most about 2, each partial sum of x c - |c|^2 / 2 is below 2^3: fp64 holds it exactly, in whatever
order a library adds. So an assignment depends on the row and the centroids alone. Sums by cluster are of int64.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.errors import UserError
from kilobatch.data.tensor_rng import KMEANS, child
from kilobatch.methods import collectives
from kilobatch.methods.tiles.torch_ops import sides

GRID = 2**23  # rows and centroids are multiples of 1 / GRID, which fp32 holds as well, up to 2
LONGEST = 2.0  # a row may be; features of unit length are what methods cluster
DISTANCE_GRID = 2**32  # sums of squared distances are of multiples of 1 / DISTANCE_GRID: up to 2^27 rows
CPU_TILE = (256, 512)  # rows x centroids
SPLIT = 1 / 1024  # by which the two halves of a cluster are moved apart, as faiss does it
PART = 65_536  # rows that are there in 8 bytes at a time
ROUND = 1e12  # operations between two calls of go_on: about 20 s on a core of a CPU


@dataclass(frozen=True)
class Clusters:
    """What k-means has found. centroids (K, D) fp32, sizes (K,) int64 and objective are the same on every rank;
    assignment (n,) int64 and distances (n,) fp64, squared, are of this rank's rows.

    objective: the sum of all squared distances, times DISTANCE_GRID.
    """

    centroids: Tensor
    sizes: Tensor
    objective: int
    assignment: Tensor
    distances: Tensor


@torch.no_grad()
def kmeans(
    index: Tensor,
    rows: Tensor,
    count: int,
    *,
    key: int,
    rounds: int,
    redos: int = 1,
    spherical: bool = False,
    start: Tensor | None = None,
    keep_empty: bool = False,
    go_on: Callable[[int, int], None] | None = None,
    tile: tuple[int, int] | None = None,
) -> Clusters:
    """Lloyd's k-means of the rows of all ranks.

    index (n,) int64, rows (n, D): this rank's; n may differ by rank. All ranks' indices together are 0 to N - 1, each
    once. count: K. key: of the draw of the K rows that it starts from, the same on every rank; start (K, D): centroids
    that it starts from instead. rounds: of assignments and means at most; it ends where no row moves, as further rounds
    would change nothing. redos: of the whole, from other rows, of which that with the least objective is kept, and of
    equal ones the first. spherical: a row goes to the centroid with the largest x c, and centroids are scaled to length
    1, for unit rows; otherwise to the nearest, argmax of x c - |c|^2 / 2, and they are means. Of equal ones the first
    centroid gets the row. go_on(done, total) is called now and then, by all ranks together, and may end it by an
    exception. tile: rows and centroids whose products are computed at once; it changes the speed alone.

    A cluster that loses all rows gets half of the largest, of equal ones the first: both centroids become the donor's,
    times 1 + SPLIT and 1 - SPLIT in turn, over dimensions and between the two. Several are filled one after the other,
    and a halved donor counts half. keep_empty: it keeps its centroid instead.

    A rank holds its rows twice in fp32, and 8 K D bytes each for centroids and for sums. It sends K (D + 1) numbers of
    8 bytes a round. Raises UserError, on all ranks, for fewer rows than centroids, and for rows that are longer than
    LONGEST or not finite.
    """
    assert start is None or redos == 1, "from one start all redos are alike"
    most, total = _check(rows, count)
    x = torch.cat([_on_grid(part.double()).float() for part in rows.split(PART)])
    search = _Search(x, most, spherical, tile or sides(x, CPU_TILE), go_on, redos * (rounds + 1))
    best = None
    for redo in range(redos):
        first = _drawn_rows(index, x, count, total, key, redo) if start is None else start.to(x.device).double()
        search.passes = redo * (rounds + 1)
        found = _lloyd(search, _on_grid(F.normalize(first, dim=1) if spherical else first), rounds, keep_empty)
        if best is None or found.objective < best.objective:
            best = found
    assert best is not None, "redos are one or more"
    return best


def own_share(count: int, device: torch.device) -> Tensor:
    """This rank's indices of `count` rows that every rank holds, for kmeans, which takes each row once."""
    return torch.arange(collectives.rank(), count, collectives.world_size(), device=device)


class _Search:
    """Looks for the nearest centroid of each row of this rank, tile by tile."""

    def __init__(
        self,
        rows: Tensor,
        most: int,
        spherical: bool,
        tile: tuple[int, int],
        go_on: Callable[[int, int], None] | None,
        total: int,
    ) -> None:
        self.rows, self.most, self.spherical, self.tile = rows, most, spherical, tile
        self.go_on, self.total, self.passes = go_on, total, 0

    def nearest(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """centroids (K, D) fp64, on the grid -> of each row the centroid (n,) and the squared distance (n,) fp64."""
        half = centroids.square().sum(1) / 2
        bias = torch.zeros_like(half) if self.spherical else -half
        chosen = torch.empty(len(self.rows), dtype=torch.int64, device=self.rows.device)
        distances = torch.empty(len(self.rows), dtype=torch.float64, device=self.rows.device)
        # All ranks go as many rounds, whether they have rows left or not: go_on is a meeting of all.
        step = max(self.tile[0], int(ROUND / (2 * centroids.numel())))
        for first in range(0, self.most, step):
            for top in range(first, min(first + step, len(self.rows)), self.tile[0]):
                x = self.rows[top : min(top + self.tile[0], first + step)].double()
                score, best = self._best(x, centroids, bias)
                chosen[top : top + len(x)] = best
                norm = x.square().sum(1) + (2 * half[best] if self.spherical else 0)
                distances[top : top + len(x)] = norm - 2 * score
            if self.go_on:
                self.go_on(self.passes * self.most + min(first + step, self.most), self.total * self.most)
        self.passes += 1
        return chosen, distances

    def _best(self, x: Tensor, centroids: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The largest x c + bias of each row, and which centroid has it first."""
        best = x.new_full((len(x),), -torch.inf)
        which = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for left in range(0, len(centroids), self.tile[1]):
            columns = slice(left, left + self.tile[1])
            score, column = torch.addmm(bias[columns], x, centroids[columns].T).max(1)
            better = score > best  # not where equal: the first has the row
            best = torch.where(better, score, best)
            which = torch.where(better, column + left, which)
        return best, which


def _lloyd(search: _Search, centroids: Tensor, rounds: int, keep_empty: bool) -> Clusters:
    count, dim = centroids.shape
    before = None
    for done in range(rounds + 1):
        chosen, distances = search.nearest(centroids)
        sums = torch.zeros(count + 1, dim + 1, dtype=torch.int64, device=centroids.device)
        for part, clusters in zip(search.rows.split(PART), chosen.split(PART), strict=True):
            sums[:, :dim].index_add_(0, clusters, (part * GRID).long())
        sums[:count, dim] = chosen.bincount(minlength=count)
        sums[count, 0] = len(chosen) if before is None else (chosen != before).sum()
        sums[count, dim] = (distances * DISTANCE_GRID).round().long().sum()
        sums = collectives.all_reduce_sum(sums)
        sizes = sums[:count, dim]
        if done == rounds or not sums[count, 0]:
            return Clusters(centroids.float(), sizes, int(sums[count, dim]), chosen, distances)
        before = chosen
        means = sums[:count, :dim].double() / (sizes.clamp_min(1)[:, None] * float(GRID))
        if keep_empty:
            means = torch.where(sizes[:, None] > 0, means, centroids)
        else:
            _fill_empty(means, sizes)
        centroids = _on_grid(F.normalize(means, dim=1) if search.spherical else means)
    raise AssertionError("the last round returns")


def _fill_empty(centroids: Tensor, sizes: Tensor) -> None:
    """Gives empty clusters halves of the largest ones: see kmeans."""
    empty: list[int] = (sizes == 0).nonzero()[:, 0].tolist()
    if not empty:
        return
    largest = [(-size, i) for i, size in enumerate(sizes.tolist())]
    heapq.heapify(largest)
    apart = torch.ones_like(centroids[0])
    apart[1::2] = -1
    apart *= SPLIT
    for i in empty:
        size, donor = heapq.heappop(largest)
        centroids[i] = centroids[donor] * (1 + apart)
        centroids[donor] *= 1 - apart
        for cluster, part in ((i, -size // 2), (donor, -size - -size // 2)):
            heapq.heappush(largest, (-part, cluster))


def _drawn_rows(index: Tensor, rows: Tensor, count: int, total: int, key: int, redo: int) -> Tensor:
    """(K, D) fp64: rows of all ranks, of K different indices that the key draws, in the order of the draw."""
    draws = child(torch.arange(total, device=index.device), KMEANS, key, redo)
    drawn = draws.argsort()[:count]
    order = drawn.argsort()  # of the drawn indices, ascending, to look for this rank's among them
    place = torch.searchsorted(drawn[order], index).clamp_max(count - 1)
    own = drawn[order][place] == index
    found = torch.zeros(count, rows.shape[1] + 1, dtype=torch.int64, device=rows.device)
    found[order[place[own]]] = F.pad((rows[own] * GRID).long(), (0, 1), value=1)
    found = collectives.all_reduce_sum(found)
    assert (found[:, -1] == 1).all(), "the ranks' indices are 0 to N - 1, each once"
    return found[:, :-1].double() / GRID


def _check(rows: Tensor, count: int) -> tuple[int, int]:
    """The most rows of a rank, and the rows of all."""
    lengths = rows.norm(dim=1).nan_to_num(torch.inf, torch.inf)
    longest = lengths.max() if len(rows) else lengths.new_zeros(())
    longest = float(collectives.all_reduce_max(longest))
    if longest > LONGEST:
        raise UserError(
            f"k-means takes rows of length up to {LONGEST:g}; the longest has {longest:g}, and inf is one with numbers "
            "that are not finite. Scale them to length 1; of diverged weights, take an earlier checkpoint"
        )
    n = torch.tensor(len(rows), device=rows.device)
    total = int(collectives.all_reduce_sum(n))
    if total < count:
        raise UserError(f"{count} clusters of {total} samples are more than one each; use {total} or fewer")
    return int(collectives.all_reduce_max(n)), total


def _on_grid(x: Tensor) -> Tensor:
    return (x * GRID).round() / GRID
