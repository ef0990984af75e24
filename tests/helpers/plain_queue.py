"""MoCo's queue and loss in the plainest code, for tests to compare with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def pairs(n: int, dim: int, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Queries and their keys (n, D), fp64; the larger spread, the less similar they are."""
    k = unit(n, dim, seed=seed)
    return F.normalize(k + spread * unit(n, dim, seed=seed + 10_000), dim=1), k


def plain(q: Tensor, k: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """He et al. 2020, algorithm 1: cross-entropy of all logits, the positive first."""
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ keys.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


def precise(q: Tensor, k: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """The same loss, with the digits that a softmax near 1 loses."""
    negatives = (q @ keys.T / temperature).logsumexp(1)
    return F.logsigmoid((q * k).sum(1) / temperature - negatives).mean().neg()


def start(length: int, dim: int) -> list[Tensor]:
    """The keys that a random start gives in one process, the oldest first."""
    torch.manual_seed(0)
    return list(Queue(QueueOptions(length=length, placement="replicated"), dim).keys.double())


def dealt(keys: list[Tensor], ranks: int) -> list[list[Tensor]]:
    """Keys of one queue, the oldest first, distributed over ranks: the newest to rank 0, the next to rank 1, ..."""
    newest_first = keys[::-1]
    return [newest_first[rank::ranks][::-1] for rank in range(ranks)]


def rows(keys: Tensor | list[Tensor]) -> list[list[float]]:
    """Keys in sorted order, to be compared as sets with repetitions."""
    return sorted((torch.stack(keys) if isinstance(keys, list) else keys).tolist())
