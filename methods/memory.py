"""What MoCo remembers: He et al. 2020, arxiv.org/abs/1911.05722; authors' code: github.com/facebookresearch/moco."""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.data.refusal import Refusal
from kilobatch.methods import across, norm
from kilobatch.methods.memory_options import QueueOptions, share
from kilobatch.methods.method import Memory
from kilobatch.methods.operand_options import Operands
from kilobatch.methods.queue_nce import QueueNCE, nearest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BLOCK = 1024  # random keys that are made at a time


class MomentumEncoder(nn.Module):
    """A copy of `online` that follows it by an exponential moving average: section 3.3, eq. 2.

    Its norms take their own batch's statistics in training, as the paper's do, but leave no trace of them: its running
    statistics are those of the online network at the last follow(). No gradient, so that neither the optimizer nor the
    gradients' average over ranks sees it. Averages are of the fp32 parameters, whatever the autocast type.
    """

    def __init__(self, online: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(online).requires_grad_(False)
        for module in norm.norms(self.network):
            module.counts = False

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    @torch.no_grad()
    def follow(self, online: nn.Module, momentum: float) -> None:
        """Moves 1 - momentum of the way to online, the network that it was made from; takes over its buffers."""
        torch._foreach_lerp_([*self.network.parameters()], [*online.parameters()], 1 - momentum)  # pyright: ignore
        if buffers := [*self.network.buffers()]:
            torch._foreach_copy_(buffers, [*online.buffers()])  # pyright: ignore[reportPrivateImportUsage]


def rising(momentum: float, progress: float) -> float:
    """From momentum at progress 0 to 1 at progress 1, by half a cosine: MoCo v3's and BYOL's momentum.

    Grill et al. 2020, arxiv.org/abs/2006.07733, section 3.2; facebookresearch/moco-v3, adjust_moco_momentum.
    """
    return 1 - (1 - momentum) * (1 + math.cos(math.pi * progress)) / 2


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


def info_nce(
    q: Tensor,
    k: Tensor,
    queue: Queue,
    temperature: float,
    further: Tensor | None = None,
    operands: Operands = "fp32",
) -> Tensor:
    """MoCo's loss (eq. 1): each query against its own key and the queue of all ranks.

    q, k: (n, D), unit rows, this rank's queries and their keys, the same n on every rank; halves are computed in fp32.
    further (n, S, D): keys of each query's own, beside the queue's. The gradient goes to q alone. temperature: a number
    > 0. operands: what the products with the queue's keys are made of, as nt_xent's.
    Returns the mean over this rank's n queries of -log( e^(q k / t) / (e^(q k / t) + sum of e^(q key / t)) ), the sum
    over the queue and further.

    Memory is O(n * D * ranks) and one tile. For a sharded queue the queries are sent, in an all-gather, and D + 1 sums
    of each, in a reduce-scatter, but no key; for a replicated one nothing here, but the keys at push: bytes are counted
    by memory_options.sent. Raises Refusal for shapes that do not fit, a temperature that is not positive, and unequal n
    (on an accelerator in a process group's first call alone).
    """
    if q.ndim != 2 or q.shape != k.shape or q.shape[1] != queue.keys.shape[1]:
        raise Refusal(
            f"info_nce takes queries and keys (n, {queue.keys.shape[1]}); got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise Refusal(f"temperature {temperature} is not a positive number; MoCo's is 0.07, v2's 0.2")
    across.refuse_unequal(len(q), "queries", q.device)
    with torch.autocast(q.device.type, enabled=False):
        q = q if q.dtype == torch.float64 else q.float()
        further = None if further is None else further.detach().to(q.dtype)
        keys, k = queue.filled(), k.detach().to(q.dtype)
        return QueueNCE.apply(q, k, keys, queue.sharded, temperature, further, None, operands)
