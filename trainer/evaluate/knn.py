"""Weighted k nearest neighbours, over ranks (Wu et al. 2018, section 3.4; arXiv:1805.01978).

Each rank holds its shard of the bank. Queries are processed in tiles: all ranks gather a tile, each rank finds the
nearest rows of its shard, and sends them to the rank that has the query, which keeps the k best. No rank holds the
whole bank, nor any N × N matrix.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.trainer.evaluate.features import Features, Images, Represent, count_rows, extract, gather_rows
from kilobatch.trainer.evaluate.options import KNNOptions
from kilobatch.trainer.ranks.heartbeat import heartbeat
from kilobatch.trainer.ranks.phase import phase

TILE = 2048  # queries (of all ranks), and bank rows, that are compared at once: 16 MiB of similarities
_NO_NEIGHBOUR = torch.iinfo(torch.int64).min
_LOW_32_BITS = 0xFFFFFFFF


@dataclass(frozen=True)
class Neighbours:
    """The k nearest bank rows of each query, nearest first.

    similarity: (n, k) float32 cosines; index: (n, k) row numbers in the whole bank, the shards being in rank order.
    Rows of equal similarity are in the order of the bank, so that duplicates in it give the same result on any number
    of ranks.
    """

    similarity: Tensor
    index: Tensor


def evaluate(
    represent: Represent, train: Images, test: Images, options: KNNOptions, among: Sequence[int] | None = None
) -> Iterator[tuple[str, float]]:
    """Yields knn/top1: the share of test images whose neighbours among the training images vote for their class.

    among: the classes whose votes count; None: all.
    """
    yield "knn/top1", accuracy(extract(represent, train), extract(represent, test), options, among)


def accuracy(
    bank: Features, test: Features, options: KNNOptions, among: Sequence[int] | None = None, *, tile: int = TILE
) -> float:
    """Top-1 in 0..1 over all ranks' test rows. Raises UserError where k is larger than the bank."""
    nearest = search(test.x, bank.x, options.k, tile=tile)
    labels = gather_rows(bank.label)
    classes = max(int(labels.max()), *(among or [0])) + 1
    voted = vote(nearest.similarity, labels[nearest.index], classes, options.temperature, among)
    tally = torch.stack([(voted == test.label).sum(), torch.full_like(voted.sum(), len(voted))])
    right, queries = collectives.all_reduce_sum(tally).tolist()
    return right / queries


def search(queries: Tensor, bank: Tensor, k: int, *, tile: int = TILE) -> Neighbours:
    """The k nearest rows of all ranks' banks, by cosine. queries (n, D) and bank (m, D): of this rank.

    Similarities are float32 products, so the order of two that agree to 1e-7 may depend on the ranks and the tile.
    Raises UserError where k is larger than the bank.
    """
    world = collectives.world_size()
    shards = count_rows(len(bank), bank.device)
    if k > sum(shards):
        raise UserError(
            f"k-NN with k {k} needs a bank of at least {k} training images, this one has {sum(shards)}; "
            f"set evaluate.knn.k to {sum(shards)} or less"
        )
    queries, bank, first = normalize(queries, dim=1), normalize(bank, dim=1), sum(shards[: collectives.rank()])
    part = max(1, tile // world)  # queries of a tile from each rank
    answers = [torch.empty(0, k, dtype=torch.int64, device=bank.device)]
    for start in range(0, max(count_rows(len(queries), bank.device)), part):
        mine = queries[start : start + part]
        padded = queries.new_zeros(part, queries.shape[1])  # (T, D), the same T on every rank
        padded[: len(mine)] = mine
        keys = _nearest(collectives.gather(padded), bank, first, k, tile)  # (W·T, k) from this rank's shard
        keys = collectives.all_to_all(keys.view(world, part, k))  # (W, T, k): from each shard, for this rank's queries
        heartbeat()
        phase("k-NN: nearest images", min(start + part, len(queries)), len(queries))
        answers.append(keys.transpose(0, 1).reshape(part, world * k).topk(k).values[: len(mine)])
    return _unpack(torch.cat(answers))


def nearest_of(similarity: Tensor, k: int) -> Neighbours:
    """The k nearest rows of a bank to each query, of cosines (n, m) float32 of this rank's own. Rows of equal
    similarity are in the order of the bank."""
    return _unpack(_pack(similarity, torch.arange(similarity.shape[1], device=similarity.device)).topk(k).values)


def vote(
    similarity: Tensor, label: Tensor, classes: int, temperature: float, among: Sequence[int] | None = None
) -> Tensor:
    """(n, k) cosines and labels -> (n,) the class with the largest sum of exp(cosine / temperature).

    among: the classes whose votes count, None: all. -1 where no neighbour is of these, so that nothing is guessed.
    """
    counts = torch.ones_like(label, dtype=torch.bool)
    if among is not None:
        counts = torch.isin(label, torch.tensor(among, device=label.device))
    # Weights relative to the nearest neighbour give the same winner, and neither over- nor underflow at small
    # temperatures.
    nearest = similarity.masked_fill(~counts, -2.0).amax(dim=1, keepdim=True)
    weight = ((similarity - nearest).double() / temperature).exp().masked_fill(~counts, 0.0)
    voted = weight.new_zeros(len(label), classes).scatter_add_(1, label, weight).argmax(dim=1)
    return voted.masked_fill(~counts.any(dim=1), -1)


def _nearest(queries: Tensor, bank: Tensor, first: int, k: int, tile: int) -> Tensor:
    """(q, D), (m, D) -> (q, k) packed neighbours in this shard, nearest first, padded with _NO_NEIGHBOUR."""
    best = torch.full((len(queries), k), _NO_NEIGHBOUR, dtype=torch.int64, device=bank.device)
    for start in range(0, len(bank), tile):
        rows = bank[start : start + tile]
        index = torch.arange(first + start, first + start + len(rows), device=bank.device)
        keys = _pack(queries @ rows.T, index)
        keys = keys.topk(min(k, len(rows))).values
        best = torch.cat([best, keys], dim=1).topk(k).values
    return best


def _pack(similarity: Tensor, index: Tensor) -> Tensor:
    """One int64 for each pair, which sorts by similarity and then by index (a lower index is the larger number).

    So ties are decided, and one top-k and one all-to-all move both. The bits of a float32 sort like an integer once
    those of negative numbers are inverted.
    """
    bits = similarity.view(torch.int32)
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32) | (_LOW_32_BITS - index)


def _unpack(keys: Tensor) -> Neighbours:
    bits = (keys >> 32).int()
    similarity = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
    return Neighbours(similarity, _LOW_32_BITS - (keys & _LOW_32_BITS))
