"""Tensors without data on ranks that are not there: what a method does to shapes, and what it would send."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the process group that sends nothing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kilobatch.methods import collectives as across
from kilobatch.trainer.costs.collective_time import Kind

aten = torch.ops.aten
KINDS: dict[str, Kind] = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::allreduce_": "all_reduce",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::alltoall_base_": "all_to_all",
}


@dataclass
class Sent:
    """calls and whole: bytes that the calls' largest tensor has, summed; by purpose and kind."""

    purpose: str = ""  # of what is sent from here on
    calls: Counter[tuple[str, Kind]] = field(default_factory=Counter)
    whole: Counter[tuple[str, Kind]] = field(default_factory=Counter)

    def note(self, kind: Kind, size: int) -> None:
        self.calls[self.purpose, kind] += 1
        self.whole[self.purpose, kind] += size


class _Shapes(TorchDispatchMode):
    """Answers what only data could: a whole number that is read is 0, and a mask picks everything, so that nothing
    is counted too small. Collectives are noted."""

    def __init__(self, sent: Sent) -> None:
        super().__init__()
        self.sent = sent

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten.batch_norm_update_stats.default:  # has no rule of its own for shapes
            mean = args[0].new_empty(args[0].shape[1], dtype=torch.float32)
            return mean, torch.empty_like(mean)
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 0  # optimizers divide by what follows from their steps
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], [_everything(where) for where in args[1]], *args[2:])
        if kind := KINDS.get(func.name().split(".")[0]):
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            size = max(x.numel() * x.element_size() for x in tensors)
            if tensors[0].is_floating_point() or size > 8 * across.size():  # not refuse_unequal's question
                self.sent.note(kind, size)
        return func(*args, **(kwargs or {}))


def _everything(where: Tensor | None) -> Tensor | None:
    return torch.arange(len(where)) if where is not None and where.dtype == torch.bool else where


class _Mode(FakeTensorMode):
    def __deepcopy__(self, memo: dict[int, Any]) -> "_Mode":
        return self


@contextmanager
def pretended(ranks: int) -> Iterator[Sent]:
    """Inside, every tensor has a shape and no data, and this process is rank 0 of `ranks`, the others of which answer
    nothing. Yields what is sent. Outside of a process group alone."""
    sent = Sent()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with (
                _Mode(allow_fallback_kernels=False),
                _Shapes(sent),
                patch.object(FakeTensor, "__deepcopy__", _copied, create=True),
                patch.object(across, "exchange", _exchange(sent)),
            ):
                yield sent
        finally:
            dist.destroy_process_group()


def _copied(x: Tensor, memo: dict[int, Any]) -> Tensor:
    """torch's own copies by address, and there is none."""
    copy = x.detach().clone()
    memo[id(x)] = nn.Parameter(copy, x.requires_grad) if isinstance(x, nn.Parameter) else copy
    return memo[id(x)]


def _exchange(sent: Sent) -> Callable[[Tensor, Tensor], Tensor]:
    """across.exchange, whose lists of who gets how much are data."""

    def exchange(x: Tensor, order: Tensor) -> Tensor:
        sent.note("all_to_all", x.numel() * x.element_size())
        return torch.empty_like(torch.empty_like(x))

    return exchange
