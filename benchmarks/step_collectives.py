"""Collectives of one step of SimCLR: counted in real calls, given by a formula, and their time on other networks."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from kilobatch.data.batch import make_batch
from kilobatch.methods import collectives
from kilobatch.methods.networks import batch_norm
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.networks.resnet import ResNet
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer.costs.collective_time import Kind, Link, seconds, sent
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.options import EngineOptions
from kilobatch.trainer.ranks.spawn import run_ranks
from kilobatch.trainer.step import check_finite, forward_backward

SAMPLES, DIM, SIDE = 16, 128, 32
RANKS_COUNTED = 2, 4, 8
FLAGS = 2  # that check_finite agrees on as well: a signal, a checkpoint
PARTS = {  # of a step's collectives, as the tables show them
    "gradients": ("gradients",),
    "embeddings": ("embeddings", "log-sum-exps"),
    "BatchNorm": ("BatchNorm, forward", "BatchNorm, backward"),
}


@dataclass(frozen=True)
class Call:
    """One collective of a step, as every rank calls it.

    size: bytes of the whole tensor: before it is reduced or scattered, after it is gathered.
    """

    what: str
    kind: Kind
    size: int


def formula(method: SimCLR, samples: int, ranks: int, mode: Mode, few: int = collectives.FEW_RANKS) -> list[Call]:
    """The collectives of one step of SimCLR, in fp32.

    samples: of a rank; few: up to so many ranks gather a norm's sums, more reduce them.
    """
    channels = [len(m.running_mean) for m in batch_norm.norms(method)]
    calls = [
        Call("gradients", "all_reduce", 4 * sum(p.numel() for p in method.parameters())),
        Call("embeddings", "all_gather", 4 * ranks * 2 * samples * DIM),
        Call("log-sum-exps", "all_gather", 4 * ranks * 2 * samples),
        Call("running statistics", "all_reduce", 4 * sum(2 * c + 1 for c in channels)),
        Call("are all finite, signals", "all_reduce", 8 * (2 * ranks + FLAGS)),
    ]
    if mode == "global":
        kind: Kind = "all_gather" if ranks <= few else "all_reduce"
        copies = ranks if ranks <= few else 1
        calls += [Call("BatchNorm, forward", kind, copies * 8 * (2 * c + 1)) for c in channels]
        calls += [Call("BatchNorm, backward", kind, copies * 4 * 2 * c) for c in channels]
    return calls


def cpu_calls(ranks: int) -> list[Call]:
    """The collectives that a step has on CPUs only: the check that all ranks have equally many samples."""
    return [Call("sizes alike", "all_gather", 8 * ranks)]


@contextmanager
def counting(counts: Counter[tuple[Kind, int]]) -> Iterator[None]:
    """Counts every collective of torch.distributed inside, by kind and bytes of the whole tensor."""

    def counted(kind: Kind, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            whole: Tensor = kwargs["tensor"] if "tensor" in kwargs else args[kind == "reduce_scatter"]
            counts[kind, whole.numel() * whole.element_size()] += 1
            return real(*args, **kwargs)

        return call

    names: dict[str, Kind] = {
        "all_reduce": "all_reduce",
        "all_gather_into_tensor": "all_gather",
        "reduce_scatter_tensor": "reduce_scatter",
        "all_to_all_single": "all_to_all",
    }
    patches = [mock.patch.object(dist, name, counted(kind, getattr(dist, name))) for name, kind in names.items()]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def simclr(mode: Mode) -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(ConvNet(16, mode), temperature=0.2, dim=DIM)


def count_step() -> dict[Mode, Counter[tuple[Kind, int]]]:
    """The collectives of the second step, for each mode of the norms: the first step makes what is made once."""
    found: dict[Mode, Counter[tuple[Kind, int]]] = {"global": Counter(), "local": Counter()}
    for mode, counts in found.items():
        method = simclr(mode)
        optimizer = torch.optim.SGD(method.parameters(), 0.1)
        engine = Engine(method, optimizer, EngineOptions(), torch.device("cpu"), SAMPLES)
        views = torch.randn(SAMPLES, 2, 3, SIDE, SIDE)
        batch = make_batch(views, torch.arange(SAMPLES), torch.zeros(SAMPLES, dtype=torch.int64))
        for of_step in (Counter(), counts):
            with counting(of_step):
                check_finite(engine, forward_backward(engine, batch), 0, [False] * FLAGS)
                engine.step(0.1)
                batch_norm.commit(method)
    return found


def counted_rows() -> list[tuple[str, ...]]:
    """For each number of ranks and mode of the norms: bytes that a rank sends, counted and by the formula.

    Raises AssertionError where they differ.
    """
    rows = []
    for ranks in RANKS_COUNTED:
        for mode, counts in run_ranks(ranks, count_step, timeout=600.0)[0].items():
            calls = formula(simclr(mode), SAMPLES, ranks, mode) + cpu_calls(ranks)
            want = Counter((call.kind, call.size) for call in calls)
            assert counts == want, (ranks, mode, counts - want, want - counts)
            row: list[str] = [f"{ranks}", mode, f"{counts.total()}"]
            for kind in ("all_reduce", "all_gather"):
                row.append(f"{sum(sent(k, size, ranks) * n for (k, size), n in counts.items() if k == kind):,.0f}")
            rows.append((*row, f"{sum(sent(call.kind, call.size, ranks) for call in calls):,.0f}"))
    return rows


def resnet50(mode: Mode) -> SimCLR:
    with torch.device("meta"):
        return SimCLR(ResNet("resnet50", "imagenet", mode), temperature=0.1, dim=DIM)


def simulated(link: Link, images: int, ranks: int, few: int = collectives.FEW_RANKS) -> dict[str, tuple[float, float]]:
    """Bytes sent and seconds in a step of SimCLR with ResNet-50 and global norms, for each of PARTS and for "all"."""
    totals = dict.fromkeys([*PARTS, "all"], (0.0, 0.0))
    for call in formula(resnet50("global"), images // ranks, ranks, "global", few):
        size, time = sent(call.kind, call.size, ranks), seconds(call.kind, call.size, ranks, link)
        for part in [name for name, calls in PARTS.items() if call.what in calls] + ["all"]:
            totals[part] = totals[part][0] + size, totals[part][1] + time
    return totals
