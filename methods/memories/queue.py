"""What MoCo remembers: He et al. 2020, arxiv.org/abs/1911.05722; authors' code: github.com/facebookresearch/moco."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.errors import Refusal
from kilobatch.methods import collectives as across
from kilobatch.methods.memories.nearest import nearest
from kilobatch.methods.memories.options import QueueOptions, share
from kilobatch.methods.method import Memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BLOCK = 1024  # random keys that are made at a time


class Queue(Memory):
    """The newest keys of all ranks, first in, first out: section 3.2. dim: D, of a key.

    Sharded, keys stay with the rank that made them, in a ring of its own: rank r holds K // W of them, one more where
    r < K % W. Where the keys of a step divide K, these rings are together, key for key, the replicated queue; else each
    holds its rank's newest. Replicated, every rank holds the keys of all. Build it inside the process group that it
    serves.

    A random start gives the same unit keys on any number of ranks, by torch's initial seed; an empty one fills first.
    """

    keys: Tensor  # (this rank's share or all, D)
    pushed: Tensor  # 0-dim int64: keys put into the ring since it was empty; the next comes to pushed % len(keys)

    def __init__(self, options: QueueOptions, dim: int) -> None:
        super().__init__()
        self.options, self.sharded = options, options.sharded
        rank, ranks = (across.rank(), across.size()) if self.sharded else (0, 1)
        if options.length < ranks:
            raise Refusal(f"method.queue.length {options.length} leaves some of {ranks} ranks without keys; use more")
        size = share(options.length, rank, ranks)
        self.register_buffer("keys", torch.zeros(size, dim, dtype=DTYPES[options.dtype]))
        self.register_buffer("pushed", torch.tensor(0 if options.start == "empty" else size))
        if options.start == "random":
            self._fill(rank, ranks)

    def _fill(self, rank: int, ranks: int) -> None:
        """Key i of K, the newest first, comes to rank i % W. Each is drawn with its block, whoever keeps it."""
        kept = 0
        for first in range(0, self.options.length, BLOCK):
            generator = torch.Generator().manual_seed(torch.initial_seed() % 2**32 * 2**31 + first)
            block = F.normalize(torch.randn(BLOCK, self.keys.shape[1], generator=generator), dim=1)
            mine = block[: self.options.length - first][(rank - first) % ranks :: ranks]
            self.keys[len(self.keys) - kept - len(mine) : len(self.keys) - kept] = mine.flip(0)
            kept += len(mine)

    def filled(self) -> Tensor:
        """(m, D): the keys that this rank holds, in no order; fewer while a queue that began empty fills."""
        if self.options.start == "random":  # full from the start: the host need not wait for the count
            return self.keys
        return self.keys[: int(self.pushed)]

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """keys (n, D): the unit keys that this rank made, the same n on every rank; they replace the oldest."""
        keys = keys.to(self.keys.dtype)
        if not self.sharded:
            keys = across.gather(keys)
        at = self.pushed + torch.arange(len(keys), device=keys.device)
        newest = slice(max(0, len(keys) - len(self.keys)), None)
        self.keys.index_copy_(0, at[newest] % len(self.keys), keys[newest])
        self.pushed += len(keys)

    @torch.no_grad()
    def hardest(self, q: Tensor, count: int) -> Tensor:
        """q (n, D), this rank's unit queries, the same n on every rank -> (n, count, D): the keys of the whole queue
        nearest to each, the nearest first; fewer while a queue that began empty holds fewer.

        Nothing is missed: each key among the nearest of all is among the nearest of its own rank. So each rank sends
        its own `count` for each query, to the query's rank: (W - 1) n count (D + 1) numbers, and holds W times that.
        """
        across.refuse_unequal(len(q), "queries", q.device)
        keys = self.filled()
        every = across.gather(q) if self.sharded else q
        score, at = nearest(every, keys, count)  # (N, count) or fewer
        found = keys[at].to(q.dtype)
        if not self.sharded or across.size() == 1:
            return found
        lacking = count - score.shape[1]  # shards differ by one key, and may be smaller than count
        score, found = F.pad(score, (0, lacking), value=-torch.inf), F.pad(found, (0, 0, 0, lacking))
        parts = across.swap(torch.cat([found, score[..., None]], 2).unflatten(0, (across.size(), len(q))))
        parts = parts.transpose(0, 1).flatten(1, 2)  # (n, W * count, D + 1)
        filled = self.options.length
        if self.options.start == "empty":
            filled = int(across.all_sum(torch.tensor(len(keys), device=q.device)))
        best = parts[..., -1].topk(min(count, filled), 1).indices
        return parts[..., :-1].gather(1, best[..., None].expand(-1, -1, q.shape[1]))

    def reshard(self, ranks: int, held: Callable[[str, int], Tensor]) -> None:
        """The keys are dealt out again by age: key i, the newest first, comes to rank i % W."""
        shares = [share(self.options.length, r, ranks) for r in range(ranks)]
        pushed = [int(held("pushed", r)) for r in range(ranks)]
        counts = torch.tensor([min(p, size) for p, size in zip(pushed, shares, strict=True)])
        rank, world = across.rank(), across.size()
        count = share(int(counts.sum()), rank, world)
        self.keys.zero_()
        self.pushed.fill_(count)
        for r in range(ranks):
            keys = held("keys", r)
            if keys.shape != (shares[r], self.keys.shape[1]):
                raise Refusal(
                    f"rank {r} of {ranks} held {tuple(keys.shape)} of the queue's keys, which should be "
                    f"{(shares[r], self.keys.shape[1])}; resume with the recipe that the checkpoint was written with"
                )
            age = torch.arange(int(counts[r]))
            newer = torch.minimum(age[:, None], counts).sum(1) + (counts[:r] > age[:, None]).sum(1)  # on all ranks
            mine = newer % world == rank
            slot = (pushed[r] - 1 - age[mine]) % shares[r]
            self.keys[count - 1 - newer[mine] // world] = keys[slot].to(self.keys)
