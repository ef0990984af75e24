"""Weighted k nearest neighbours, over ranks (Wu et al. 2018, section 3.4; arXiv:1805.01978).

Each rank holds its shard of the bank. Queries travel in tiles: gathered, answered by every shard, and the shards'
answers sent to the rank that asked, which keeps the k best. No rank holds the bank, nor any N × N matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kilobatch.data.errors import Refusal
from kilobatch.methods import collectives as across
from kilobatch.trainer.evaluate.features import Features, Images, Represent, count_rows, exchange, extract, gather_rows
from kilobatch.trainer.evaluate.options import KNNOptions
from kilobatch.trainer.ranks.heartbeat import beat

TILE = 2048  # queries (of all ranks) × bank rows that are compared at once: 16 MiB of similarities
_NOBODY = torch.iinfo(torch.int64).min
_LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class Found:
    """The nearest first. similarity: (n, k) float32 cosines; index: (n, k) rows of the whole bank in rank order.

    Equal similarities stand in the order of the bank, so that duplicates in it make no difference between worlds.
    """

    similarity: Tensor
    index: Tensor


def evaluate(represent: Represent, train: Images, test: Images, options: KNNOptions) -> Iterator[tuple[str, float]]:
    """Yields knn/top1: the share of test images whose neighbours among the training images vote for their class."""
    yield "knn/top1", accuracy(extract(represent, train), extract(represent, test), options)


def accuracy(bank: Features, test: Features, options: KNNOptions, *, tile: int = TILE) -> float:
    """Top-1 in 0..1 over all ranks' test rows. Raises Refusal where k is larger than the bank."""
    found = search(test.x, bank.x, options.k, tile=tile)
    labels = gather_rows(bank.label)
    voted = vote(found.similarity, labels[found.index], int(labels.max()) + 1, options.temperature)
    tally = torch.stack([(voted == test.label).sum(), torch.full_like(voted.sum(), len(voted))])
    right, asked = across.all_sum(tally).tolist()
    return right / asked


def search(queries: Tensor, bank: Tensor, k: int, *, tile: int = TILE) -> Found:
    """queries (n, D) and bank (m, D) of this rank -> the k nearest rows of all ranks' banks, by cosine.

    Similarities are float32 products, so worlds and tiles may differ where two of them are equal to 1e-7.
    Raises Refusal where k is larger than the bank.
    """
    world = across.size()
    shards = count_rows(len(bank), bank.device)
    if k > sum(shards):
        raise Refusal(
            f"k-NN with k {k} needs a bank of at least {k} training images, this one has {sum(shards)}; "
            f"set evaluate.knn.k to {sum(shards)} or less"
        )
    queries, bank, first = normalize(queries, dim=1), normalize(bank, dim=1), sum(shards[: across.rank()])
    each = max(1, tile // world)
    answers = [torch.empty(0, k, dtype=torch.int64, device=bank.device)]
    for start in range(0, max(count_rows(len(queries), bank.device)), each):
        mine = queries[start : start + each]
        asked = queries.new_zeros(each, queries.shape[1])  # (T, D), the same number from each rank
        asked[: len(mine)] = mine
        keys = _nearest(across.gather(asked), bank, first, k, tile)  # (W·T, k) from my shard
        keys = exchange(keys.view(world, each, k))  # (W, T, k): every shard's answer to my queries
        beat()
        answers.append(keys.transpose(0, 1).reshape(each, world * k).topk(k).values[: len(mine)])
    return _unpack(torch.cat(answers))


def vote(similarity: Tensor, label: Tensor, classes: int, temperature: float) -> Tensor:
    """(n, k) cosines and labels -> (n,) the class with the largest sum of exp(cosine / temperature)."""
    # Weights relative to the nearest: the same winner, without overflow at small temperatures.
    weight = ((similarity - similarity[:, :1]).double() / temperature).exp()
    return weight.new_zeros(len(label), classes).scatter_add_(1, label, weight).argmax(dim=1)


def _nearest(queries: Tensor, bank: Tensor, first: int, k: int, tile: int) -> Tensor:
    """(q, D), (m, D) -> (q, k) packed neighbours within this shard, the best first, filled up with _NOBODY."""
    best = torch.full((len(queries), k), _NOBODY, dtype=torch.int64, device=bank.device)
    for start in range(0, len(bank), tile):
        rows = bank[start : start + tile]
        index = torch.arange(first + start, first + start + len(rows), device=bank.device)
        keys = _pack(queries @ rows.T, index)
        keys = keys.topk(min(k, len(rows))).values
        best = torch.cat([best, keys], dim=1).topk(k).values
    return best


def _pack(similarity: Tensor, index: Tensor) -> Tensor:
    """One int64 that sorts by similarity, then by index (the lower is the larger): ties are decided, and one top-k
    and one exchange carry both. A float32's bits already sort like integers, once negatives are turned round."""
    bits = similarity.view(torch.int32)
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32) | (_LOW - index)


def _unpack(keys: Tensor) -> Found:
    bits = (keys >> 32).int()
    return Found(torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32), _LOW - (keys & _LOW))
