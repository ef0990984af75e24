"""Everything that crosses ranks, with its gradient. Alone (no process group, or one process) each is the identity.

One convention everywhere: a loss is the mean over this rank's own samples, and the engine averages gradients over
ranks. So a backward here sums over ranks what every rank's loss asks of the value, and the average of the parameters'
gradients is then the gradient of the global mean.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from kilobatch.data.errors import Refusal

FEW = 8  # ranks, about those of one machine: benchmarks/scaling.md
_agreed: WeakKeyDictionary[dist.ProcessGroup, set[str]] = WeakKeyDictionary()  # by group: what all brought as many of


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        every = x.new_empty(size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(every, x.contiguous())
        return every

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return scatter_sum(grads[0])


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Sum.forward(ctx, grads[0])


def gather(x: Tensor) -> Tensor:
    """x (N, ...), the same N on every rank -> (W * N, ...), rank by rank."""
    return _Gather.apply(x) if size() > 1 else x


def all_sum(x: Tensor) -> Tensor:
    """The sum of x over ranks."""
    return _Sum.apply(x) if size() > 1 else x


def small_sum(x: Tensor) -> Tensor:
    """The sum of x over ranks, without gradient, for few bytes, where the way from rank to rank is what takes time.

    Up to FEW ranks gather and add: half the hops of an all-reduce. More reduce: the hops of an all-gather grow with the
    ranks, those of an all-reduce by a tree with their logarithm. Both ways give every rank the same bits.
    """
    return gather(x.detach()[None]).sum(0) if size() <= FEW else all_sum(x.detach())


def all_max(x: Tensor) -> Tensor:
    """The largest of each of x's elements over ranks, without gradient."""
    largest = x.clone(memory_format=torch.contiguous_format)
    if size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def mean(x: Tensor) -> Tensor:
    """The mean of x over ranks."""
    return all_sum(x) / size()


def scatter_sum(x: Tensor) -> Tensor:
    """x (W * n, ...) -> (n, ...): this rank's rows of the sum of x over ranks, without gradient."""
    if size() == 1:
        return x
    mine = x.new_empty(len(x) // size(), *x.shape[1:])
    dist.reduce_scatter_tensor(mine, x.contiguous())
    return mine


def swap(x: Tensor) -> Tensor:
    """x (W, ...), something for each rank -> (W, ...), what each rank had for this one, without gradient."""
    if size() == 1:
        return x
    arrived = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(arrived, x.contiguous())
    return arrived


def own(n: int, device: torch.device | None = None) -> Tensor:
    """(n,) int64: where this rank's n rows stand in gather()."""
    return torch.arange(n, device=device) + n * rank()


def exchange(x: Tensor, order: Tensor) -> Tensor:
    """This rank's part of the rows of all ranks in another order, without gradient: one all-to-all.

    x (n, ...), the same n on every rank; order (W * n,) int64 on the CPU, a permutation, the same on every rank. With
    all ranks' rows in rank order, row i afterwards is row order[i] before: of the result (n, ...), row i of rank r is
    row order[r * n + i].
    """
    n = len(x)
    blocks = order.view(size(), n)  # what each rank gets
    mine = blocks // n == rank()
    source = blocks[rank()] // n  # (n,): who has what this rank gets
    leaving = x.detach()[(blocks[mine] - n * rank()).to(x.device, non_blocking=True)]
    if size() == 1:
        return leaving
    arrived = torch.empty_like(leaving)  # by source, each one's in the order that this rank wants
    dist.all_to_all_single(arrived, leaving, source.bincount(minlength=size()).tolist(), mine.sum(1).tolist())
    return arrived[source.argsort(stable=True).argsort().to(x.device, non_blocking=True)]


def refuse_unequal(n: int, what: str, device: torch.device) -> None:
    """Raises Refusal on every rank unless n is the same on all: with other sizes gather() would hang or mix rows.

    Asks in every call where the tensors are on a CPU. On an accelerator the answer makes the host wait, so it is asked
    once for each `what` in a process group's life, and the loader's dropping of incomplete batches keeps it true.
    Never by n: a rank whose n alone changes would ask, and meet the gather() of those whose n did not.
    """
    group = dist.group.WORLD if dist.is_initialized() else None
    if group is None or size() == 1:
        return
    agreed = _agreed.setdefault(group, set())
    if what in agreed and device.type != "cpu":
        return
    counts: list[int] = gather(torch.tensor([n], device=device)).tolist()
    if len(set(counts)) > 1:
        raise Refusal(
            f"{what} differ over ranks: {counts}; every rank must bring as many, so drop the incomplete batch"
        )
    agreed.add(what)
