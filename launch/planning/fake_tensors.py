"""Fake tensors (shapes without data) and a fake process group of any size, to count what a method's step computes and
sends."""

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
from torch.utils.flop_counter import FlopCounterMode

from kilobatch.methods import collectives
from kilobatch.methods.networks import vit
from kilobatch.trainer.costs.collective_time import Kind

aten = torch.ops.aten
KINDS: dict[str, Kind] = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::allreduce_": "all_reduce",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::alltoall_base_": "all_to_all",
}


@dataclass
class Traffic:
    """The collectives of a step, by purpose and kind. calls: their number; whole: the bytes of each call's largest
    tensor, summed over the calls."""

    purpose: str = ""  # of the collectives that are noted from here on
    calls: Counter[tuple[str, Kind]] = field(default_factory=Counter)
    whole: Counter[tuple[str, Kind]] = field(default_factory=Counter)

    def note(self, kind: Kind, size: int) -> None:
        self.calls[self.purpose, kind] += 1
        self.whole[self.purpose, kind] += size


class FlopCounter(FlopCounterMode):
    """Counts operations without telling modules apart: that takes hooks, which would keep alive what a block that is
    computed again in the backward has made."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = _NoModules()


class _NoModules:
    """What FlopCounterMode asks of its tracker of modules."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


class _Shapes(TorchDispatchMode):
    """Supplies values where an operation needs data: an integer that is read is 0, and a mask selects everything, so
    that no memory is counted too small. Notes collectives."""

    def __init__(self, sent: Traffic) -> None:
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
            args = (args[0], [_all_rows(index) for index in args[1]], *args[2:])
        if kind := KINDS.get(func.name().split(".")[0]):
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            size = max(x.numel() * x.element_size() for x in tensors)
            if (
                tensors[0].is_floating_point() or size > 8 * collectives.world_size()
            ):  # else it is the comparison of sizes by refuse_unequal
                self.sent.note(kind, size)
        return func(*args, **(kwargs or {}))


def _all_rows(index: Tensor | None) -> Tensor | None:
    return torch.arange(len(index)) if index is not None and index.dtype == torch.bool else index


class _Mode(FakeTensorMode):
    def __deepcopy__(self, memo: dict[int, Any]) -> "_Mode":
        return self


@contextmanager
def fake_ranks(ranks: int) -> Iterator[Traffic]:
    """Makes all tensors of the context fake, and this process rank 0 of a fake process group of `ranks`. Yields the
    traffic. To be called outside of any process group."""
    sent = Traffic()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with (
                _Mode(allow_fallback_kernels=False),
                _Shapes(sent),
                patch.object(FakeTensor, "__deepcopy__", _copied, create=True),
                patch.object(collectives, "exchange", _exchange(sent)),
                # Positions are kept from call to call, and a fake tensor is of no use after its context.
                patch.object(vit, "positions", vit.positions.__wrapped__),
            ):
                yield sent
        finally:
            dist.destroy_process_group()


def _copied(x: Tensor, memo: dict[int, Any]) -> Tensor:
    """Replaces Tensor.__deepcopy__, which copies by the storage's address: a fake tensor has none."""
    copy = x.detach().clone()
    memo[id(x)] = nn.Parameter(copy, x.requires_grad) if isinstance(x, nn.Parameter) else copy
    return memo[id(x)]


def _exchange(sent: Traffic) -> Callable[[Tensor, Tensor], Tensor]:
    """A replacement for collectives.exchange, which needs data to know how many rows each rank gets."""

    def exchange(x: Tensor, order: Tensor) -> Tensor:
        sent.note("all_to_all", x.numel() * x.element_size())
        return torch.empty_like(torch.empty_like(x))

    return exchange
