"""MoCo's queue of keys: He et al. 2020, arxiv.org/abs/1911.05722; authors' code: github.com/facebookresearch/moco."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.methods.memories.nearest import nearest
from kilobatch.methods.memories.options import QueueOptions, share
from kilobatch.methods.memories.random_rows import random_unit_rows
from kilobatch.methods.method import Memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Queue(Memory):
    """The newest keys of all ranks, first in, first out: section 3.2. dim: D, of a key.

    Sharded: a key stays on the rank that made it, in a ring buffer; rank r holds K // W keys, one more if r < K % W. If
    the keys of a step divide K, the ring buffers hold together, key for key, what the replicated queue holds; otherwise
    each holds the newest keys of its rank. Replicated: every rank holds the keys of all. To be built inside the process
    group that uses it.

    With a random start the keys are the same on any number of ranks, by torch's initial seed; an empty queue fills
    first.
    """

    keys: Tensor  # (this rank's share or all, D)
    pushed: Tensor  # 0-dim int64: keys written since the ring was empty; the next one goes to pushed % len(keys)

    def __init__(self, options: QueueOptions, dim: int) -> None:
        super().__init__()
        self.options, self.sharded = options, options.sharded
        rank, ranks = (collectives.rank(), collectives.world_size()) if self.sharded else (0, 1)
        if options.length < ranks:
            raise UserError(f"method.queue.length {options.length} leaves some of {ranks} ranks without keys; use more")
        size = share(options.length, rank, ranks)
        self.register_buffer("keys", torch.zeros(size, dim, dtype=DTYPES[options.dtype]))
        self.register_buffer("pushed", torch.tensor(0 if options.start == "empty" else size))
        if options.start == "random":
            self._fill(rank, ranks)

    def _fill(self, rank: int, ranks: int) -> None:
        """Fills the ring with random keys: key i of K, the newest first, belongs to rank i % W."""
        done = 0
        for first, block in random_unit_rows(self.options.length, self.keys.shape[1]):
            own = block[(rank - first) % ranks :: ranks]
            self.keys[len(self.keys) - done - len(own) : len(self.keys) - done] = own.flip(0)
            done += len(own)

    def filled(self) -> Tensor:
        """(m, D): the keys that this rank holds, in any order; fewer while a queue that started empty fills."""
        if self.options.start == "random":  # full from the start, so that the host need not wait for `pushed`
            return self.keys
        return self.keys[: int(self.pushed)]

    def held(self) -> int:
        """How many keys all ranks hold together: the same on every rank. While a sharded queue that started empty may
        fill, each sends one number, as their shares may differ by one key."""
        if self.options.start == "random":
            return self.options.length
        own = torch.tensor(len(self.filled()), device=self.keys.device)
        return int(collectives.all_reduce_sum(own) if self.sharded else own)

    def is_full(self) -> bool:
        return self.held() == self.options.length

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Replaces the oldest keys by keys (n, D), the unit keys that this rank made, the same n on every rank."""
        keys = keys.to(self.keys.dtype)
        self._write(keys if self.sharded else collectives.gather(keys), self.keys)
        self.pushed += len(keys) if self.sharded else len(keys) * collectives.world_size()

    def _write(self, rows: Tensor, ring: Tensor) -> None:
        """Puts rows, one for each pushed key, at the keys' positions in a ring of as many rows as keys."""
        positions = self.pushed + torch.arange(len(rows), device=rows.device)
        newest = slice(max(0, len(rows) - len(ring)), None)
        ring.index_copy_(0, positions[newest] % len(ring), rows[newest])

    @torch.no_grad()
    def hardest(self, q: Tensor, count: int) -> Tensor:
        """The keys of the whole queue nearest to each query, nearest first.

        q (n, D): this rank's unit queries, the same n on every rank -> (n, count, D); fewer while a queue that started
        empty holds fewer.

        Each rank sends, for each query, its own `count` nearest keys to the query's rank: (W - 1) n count (D + 1)
        numbers, and holds W times that. That is exact: a key among the nearest of all is among the nearest of its rank.
        """
        collectives.refuse_unequal(len(q), "queries", q.device)
        keys = self.filled()
        queries = collectives.gather(q) if self.sharded else q
        scores, rows = nearest(queries, keys, count)  # (N, count) or fewer
        local = keys[rows].to(q.dtype)
        if not self.sharded or collectives.world_size() == 1:
            return local
        missing = count - scores.shape[1]  # shards differ by one key, and may be smaller than count
        scores, local = F.pad(scores, (0, missing), value=-torch.inf), F.pad(local, (0, 0, 0, missing))
        candidates = collectives.all_to_all(
            torch.cat([local, scores[..., None]], 2).unflatten(0, (collectives.world_size(), len(q)))
        )
        candidates = candidates.transpose(0, 1).flatten(1, 2)  # (n, W * count, D + 1)
        top = candidates[..., -1].topk(min(count, self.held()), 1).indices
        return candidates[..., :-1].gather(1, top[..., None].expand(-1, -1, q.shape[1]))

    def reshard(self, ranks: int, held: Callable[[str, int], Tensor]) -> None:
        """Distributes the keys anew by age: key i, the newest first, goes to rank i % W."""
        shares = [share(self.options.length, r, ranks) for r in range(ranks)]
        pushed = [int(held("pushed", r)) for r in range(ranks)]
        counts = torch.tensor([min(p, size) for p, size in zip(pushed, shares, strict=True)])
        rank, world = collectives.rank(), collectives.world_size()
        count = share(int(counts.sum()), rank, world)
        self.keys.zero_()
        self.pushed.fill_(count)
        for r in range(ranks):
            keys = held("keys", r)
            if keys.shape != (shares[r], self.keys.shape[1]):
                raise UserError(
                    f"rank {r} of {ranks} held {tuple(keys.shape)} of the queue's keys, which should be "
                    f"{(shares[r], self.keys.shape[1])}; resume with the recipe that the checkpoint was written with"
                )
            age = torch.arange(int(counts[r]))
            newer = torch.minimum(age[:, None], counts).sum(1) + (counts[:r] > age[:, None]).sum(1)  # keys of all ranks
            own = newer % world == rank
            slot = (pushed[r] - 1 - age[own]) % shares[r]
            self._place(count - 1 - newer[own] // world, slot, lambda name, r=r: held(name, r))

    def _place(self, positions: Tensor, slots: Tensor, held: Callable[[str], Tensor]) -> None:
        """Reads keys from the slots of a rank of a checkpoint, whose buffers `held` reads by name."""
        self.keys[positions] = held("keys")[slots].to(self.keys)


def steps_to_fill(method: nn.Module, batch: int) -> int:
    """The number of steps, of `batch` images each, after which all queues hold keys of the training alone, whether they
    started empty or with random keys; at most that, as an image may give two keys. 0: there is no queue."""
    lengths = [module.options.length for module in method.modules() if isinstance(module, Queue)]
    return -(-max(lengths, default=0) // batch)
