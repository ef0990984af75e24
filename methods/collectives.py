"""Collectives with gradients: the one place where tensors cross ranks. Without a process group, or with one process,
each is the identity.

One convention holds everywhere: a loss is the mean over this rank's own samples, and the engine averages gradients over
ranks. So a backward here sums the gradients that all ranks' losses have for the value, and the average of the
parameters' gradients is then the gradient of the global mean.
"""

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from kilobatch.data.errors import UserError

FEW_RANKS = 8  # up to so many, about those of one machine, gather is faster than all-reduce: benchmarks/scaling.md
_checked: WeakKeyDictionary[dist.ProcessGroup, set[str]] = WeakKeyDictionary()  # by group: what had equal sizes


T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def from_rank_0(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank; on the others it is not called. It is pickled: keep it small."""
    if world_size() == 1:
        return make()
    found: list[Any] = [make() if rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gathered = x.new_empty(world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return reduce_scatter(grads[0])


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
    return _Gather.apply(x) if world_size() > 1 else x


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over ranks."""
    return _Sum.apply(x) if world_size() > 1 else x


def all_reduce_small(x: Tensor) -> Tensor:
    """The sum of a small x over ranks, without gradient: for few bytes, where latency is what takes time.

    Up to FEW_RANKS ranks gather and add, in half the hops of an all-reduce. More ranks all-reduce: the hops
    of an all-gather grow with the ranks, those of an all-reduce by a tree with their logarithm. Either gives every rank
    the same bits.
    """
    return gather(x.detach()[None]).sum(0) if world_size() <= FEW_RANKS else all_reduce_sum(x.detach())


def all_reduce_max(x: Tensor) -> Tensor:
    """The elementwise maximum of x over ranks, without gradient."""
    maximum = x.clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    return maximum


def mean(x: Tensor) -> Tensor:
    """The mean of x over ranks."""
    return all_reduce_sum(x) / world_size()


def reduce_scatter(x: Tensor) -> Tensor:
    """x (W * n, ...) -> (n, ...): this rank's rows of the sum of x over ranks, without gradient."""
    if world_size() == 1:
        return x
    own = x.new_empty(len(x) // world_size(), *x.shape[1:])
    dist.reduce_scatter_tensor(own, x.contiguous())
    return own


def all_to_all(x: Tensor) -> Tensor:
    """x (W, ...), row r for rank r -> (W, ...), row r from rank r, without gradient."""
    if world_size() == 1:
        return x
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, x.contiguous())
    return received


def local_rows(n: int, device: torch.device | None = None) -> Tensor:
    """(n,) int64: the positions of this rank's n rows in the result of gather()."""
    return torch.arange(n, device=device) + n * rank()


def exchange(x: Tensor, order: Tensor) -> Tensor:
    """Permutes the rows of all ranks and returns this rank's part of them, without gradient, in one all-to-all.

    x (n, ...), the same n on every rank; order (W * n,) int64 on the CPU, a permutation, the same on every rank. With
    all ranks' rows in rank order, row i afterwards is row order[i] before: of the result (n, ...), row i of rank r is
    row order[r * n + i].
    """
    n = len(x)
    blocks = order.view(world_size(), n)  # row r: the rows that rank r gets
    is_own = blocks // n == rank()
    source = blocks[rank()] // n  # (n,): the rank that has each row which this rank gets
    outgoing = x.detach()[(blocks[is_own] - n * rank()).to(x.device, non_blocking=True)]
    if world_size() == 1:
        return outgoing
    received = torch.empty_like(outgoing)  # grouped by source, and within a source in the order of blocks[rank()]
    sizes = source.bincount(minlength=world_size()).tolist(), is_own.sum(1).tolist()
    dist.all_to_all_single(received, outgoing, *sizes)
    return received[source.argsort(stable=True).argsort().to(x.device, non_blocking=True)]


def refuse_unequal(n: int, what: str, device: torch.device) -> None:
    """Raises UserError on every rank unless n is the same on all: with unequal sizes gather() would hang or mix rows.

    On a CPU every call compares. On an accelerator a comparison makes the host wait, so it is made once for each `what`
    in a process group's life; the sizes stay equal since the loader drops incomplete batches. The comparison is not
    repeated for another n: if n changed on one rank alone, that rank would compare while the others are in gather().
    """
    group = dist.group.WORLD if dist.is_initialized() else None
    if group is None or world_size() == 1:
        return
    checked = _checked.setdefault(group, set())
    if what in checked and device.type != "cpu":
        return
    counts: list[int] = gather(torch.tensor([n], device=device)).tolist()
    if len(set(counts)) > 1:
        raise UserError(
            f"{what} differ over ranks: {counts}; every rank must bring as many, so drop the incomplete batch"
        )
    checked.add(what)
