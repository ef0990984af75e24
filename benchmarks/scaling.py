"""What a step sends, and how long its collectives take, up to 1024 ranks: counted at 2, 4 and 8, computed beyond.

    python -m benchmarks.scaling           # some minutes; writes scaling.md and scaling.png beside this file

Counted: every collective of one real step (DeepSpeed engine, gloo, SimCLR, the demo's encoder), by kind and size; the
formula must give the same list. Timed: all-reduce and all-gather of several sizes on this machine's gloo, one after the
other as in a step; the model's two constants are fitted at 2 and 8 ranks and then asked for 3, 4 and 6.
"""

import argparse
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.cached import table
from kilobatch.data.batch import Batch
from kilobatch.launch.planning.machines import HOPS
from kilobatch.methods import collectives as across
from kilobatch.methods.networks import batch_norm as norm
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.networks.resnet import ResNet
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer.costs.collective_time import Call, Kind, Link, seconds, sent
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.options import EngineOptions
from kilobatch.trainer.ranks.spawn import run_ranks
from kilobatch.trainer.step import check_finite, forward_backward

SAMPLES, DIM, SIDE = 16, 128, 32
COUNTED = 2, 4, 8
TIMED, FITTED = (2, 3, 4, 6, 8), (2, 8)
CHANNELS = 512  # of a norm whose sums are timed
RANKS = [2**k for k in range(3, 11)]  # computed
FLAGS = 2  # that check_finite agrees on besides: a signal, a checkpoint
SIZES = [2**k for k in (12, 14, 16, 18, 20, 22, 24)]  # bytes
HERE = Path(__file__).parent
# Bandwidths are the makers' (NVIDIA H100 SXM: NVLink 900 GB/s both ways; NDR InfiniBand 400 Gb/s, one adapter to a
# GPU), latencies those of a plan; Ethernet's is assumed.
H100 = Link("H100, NVLink and NDR InfiniBand", 8, 450e9, HOPS[0], 50e9, HOPS[1])
ETHERNET = Link("the same GPUs, 100 Gb/s Ethernet to each node of 8", 8, 450e9, HOPS[0], 12.5e9 / 8, 20e-6)


def formula(method: SimCLR, samples: int, ranks: int, mode: Mode, few: int = across.FEW) -> list[Call]:
    """The collectives of one step of SimCLR, in fp32; samples: of a rank; few: ranks that gather a norm's sums."""
    channels = [len(m.running_mean) for m in norm.norms(method)]
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


def on_a_cpu(ranks: int) -> list[Call]:
    """What a CPU's step asks besides: whether all ranks brought as many samples."""
    return [Call("sizes alike", "all_gather", 8 * ranks)]


@contextmanager
def counting(found: Counter[tuple[Kind, int]]) -> Iterator[None]:
    """Every collective of torch.distributed inside, by kind and bytes of the whole."""

    def counted(kind: Kind, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            whole: Tensor = kwargs["tensor"] if "tensor" in kwargs else args[kind == "reduce_scatter"]
            found[kind, whole.numel() * whole.element_size()] += 1
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


def step() -> dict[Mode, Counter[tuple[Kind, int]]]:
    """Of the second step: the first makes what is made once."""
    found: dict[Mode, Counter[tuple[Kind, int]]] = {"global": Counter(), "local": Counter()}
    for mode, counts in found.items():
        method = simclr(mode)
        optimizer = torch.optim.SGD(method.parameters(), 0.1)
        engine = Engine(method, optimizer, EngineOptions(), torch.device("cpu"), SAMPLES)
        views = torch.randn(SAMPLES, 2, 3, SIDE, SIDE)
        batch = Batch(views, torch.arange(SAMPLES), torch.zeros(SAMPLES, dtype=torch.int64))
        for counted in (Counter(), counts):
            with counting(counted):
                check_finite(engine, forward_backward(engine, batch), 0, [False] * FLAGS)
                engine.step(0.1)
                norm.commit(method)
    return found


@contextmanager
def preferred(asked: bool) -> Iterator[None]:
    """This session's processes before those of others (Linux's autogroup; needs to be root)."""
    group = Path("/proc/self/autogroup")
    if asked:
        group.write_text("-20")
    yield
    if asked:
        group.write_text("0")


def timed(rounds: int) -> tuple[dict[tuple[Kind, int], float], dict[str, float]]:
    """Seconds of a collective, on average over some in a row, the best of its rounds; and of a norm's sums, by both
    ways of across.small_sum."""

    def best(run: Callable[[], Any], calls: int) -> float:
        found = float("inf")
        for _ in range(rounds):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            found = min(found, (time.perf_counter() - start) / calls)
        return across.all_max(torch.tensor(found)).item()

    found: dict[tuple[Kind, int], float] = {}
    for size in SIZES:
        part = torch.zeros(size // 4 // across.size())
        whole = torch.zeros(len(part) * across.size())
        calls = 10 if size <= 2**18 else 2
        found["all_reduce", size] = best(lambda x=whole: dist.all_reduce(x), calls)
        found["all_gather", size] = best(lambda x=whole, y=part: dist.all_gather_into_tensor(x, y), calls)
    sums = torch.zeros(2 * CHANNELS + 1, dtype=torch.float64)
    ways = {}
    for way, few in (("gathered", across.size()), ("reduced", 1)):
        with mock.patch.object(across, "FEW", few):
            ways[way] = best(lambda: across.small_sum(sums), 10)
    return found, ways


def told(kind: Kind, size: int, ranks: int, latency: float, bandwidth: float) -> float:
    """Seconds by the model, on this machine. A hop is work for a processor, for which ranks take turns if they are
    more; bytes are not: two ranks alone leave two processors idle half of the time, waiting for each other."""
    turns = max(1.0, ranks / len(os.sched_getaffinity(0)))
    return seconds(kind, size, ranks, Link("gloo", 10**6, bandwidth, turns * latency, bandwidth, turns * latency))


def fit(times: dict[int, dict[tuple[Kind, int], float]], kind: Kind) -> tuple[float, float]:
    """The latency and bandwidth that come nearest to the logarithms of the times of FITTED, by search."""

    def off(constants: tuple[float, float]) -> float:
        points = [(told(kind, size, w, *constants), times[w][kind, size]) for w in FITTED for size in SIZES]
        return sum(math.log(model / took) ** 2 for model, took in points)

    tried = product(torch.logspace(-5, -2.5, 101).tolist(), torch.logspace(7.5, 10.5, 121).tolist())
    return min(tried, key=off)


def counted_rows() -> list[tuple[str, ...]]:
    """Per number of ranks and norm: bytes that a rank sends, counted and by the formula. Raises where they differ."""
    rows = []
    for ranks in COUNTED:
        for mode, counts in run_ranks(ranks, step, timeout=600.0)[0].items():
            calls = formula(simclr(mode), SAMPLES, ranks, mode) + on_a_cpu(ranks)
            want = Counter((call.kind, call.size) for call in calls)
            assert counts == want, (ranks, mode, counts - want, want - counts)
            row: list[str] = [f"{ranks}", mode, f"{counts.total()}"]
            for kind in ("all_reduce", "all_gather"):
                row.append(f"{sum(sent(k, size, ranks) * n for (k, size), n in counts.items() if k == kind):,.0f}")
            rows.append((*row, f"{sum(sent(call.kind, call.size, ranks) for call in calls):,.0f}"))
    return rows


@dataclass(frozen=True)
class Timed:
    """Rows of the two tables; off: how many times the model is too high or too low, where it was not fitted; sorted."""

    collectives: list[tuple[str, ...]]
    sums: list[tuple[str, ...]]
    constants: list[str]
    off: list[float]


def timed_rows(rounds: int) -> Timed:
    runs = {ranks: run_ranks(ranks, timed, rounds, timeout=900.0)[0] for ranks in TIMED}
    times = {ranks: found for ranks, (found, _) in runs.items()}
    rows, constants, off = [], [], []
    for kind in ("all_reduce", "all_gather"):
        latency, bandwidth = fit(times, kind)
        constants.append(f"{kind} {latency * 1e6:.0f} µs a hop and {bandwidth / 1e9:.2f} GB/s")
        for size in SIZES:
            row = [kind, f"{size // 1024:,}"]
            for ranks in TIMED:
                model, took = told(kind, size, ranks, latency, bandwidth), times[ranks][kind, size]
                row.append(f"{took * 1e3:.2f} ({model * 1e3:.2f})")
                if ranks not in FITTED:
                    off.append(max(model / took, took / model))
            rows.append(tuple(row))
    ways = [(way, *(f"{runs[ranks][1][way] * 1e3:.2f}" for ranks in TIMED)) for way in ("gathered", "reduced")]
    return Timed(rows, ways, constants, sorted(off))


def resnet50(mode: Mode) -> SimCLR:
    with torch.device("meta"):
        return SimCLR(ResNet("resnet50", "imagenet", mode), temperature=0.1, dim=DIM)


SETTINGS = {  # global batch by ranks
    "64 images a rank": lambda ranks: 64 * ranks,
    "4096 images in all": lambda ranks: 4096,
}


PARTS = {
    "gradients": ("gradients",),
    "embeddings": ("embeddings", "log-sum-exps"),
    "BatchNorm": ("BatchNorm, forward", "BatchNorm, backward"),
}


def simulated(link: Link, images: int, ranks: int, few: int = across.FEW) -> dict[str, tuple[float, float]]:
    """By what is sent, and in all: bytes sent and seconds, in a step of SimCLR with ResNet-50 and global norms."""
    found = dict.fromkeys([*PARTS, "all"], (0.0, 0.0))
    for call in formula(resnet50("global"), images // ranks, ranks, "global", few):
        bytes_, time = sent(call.kind, call.size, ranks), seconds(call.kind, call.size, ranks, link)
        for part in [name for name, calls in PARTS.items() if call.what in calls] + ["all"]:
            found[part] = found[part][0] + bytes_, found[part][1] + time
    return found


def simulated_rows(link: Link, images: Callable[[int], int]) -> list[tuple[str, ...]]:
    rows = []
    for ranks in RANKS:
        found = simulated(link, images(ranks), ranks)
        cells = [f"{found[part][0] / 1e6:.1f} MB, {found[part][1] * 1e3:.2f} ms" for part in PARTS]
        gathered = simulated(link, images(ranks), ranks, few=ranks)["BatchNorm"][1]
        rows.append(
            (f"{ranks}", f"{images(ranks):,}", *cells, f"{found['all'][1] * 1e3:.1f} ms", f"{gathered * 1e3:.2f} ms")
        )
    return rows


def plot(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=90, layout="constrained")
    for axes, (name, images) in zip(figure.subplots(1, 2, sharey=True), SETTINGS.items(), strict=True):
        for link, style in ((H100, "-"), (ETHERNET, "--")):
            found = [simulated(link, images(ranks), ranks) for ranks in RANKS]
            for k, part in enumerate(PARTS):
                times = [one[part][1] * 1e3 for one in found]
                axes.plot(RANKS, times, style, color=f"C{k}", label=part if link is H100 else None)
        gathered = [simulated(H100, images(ranks), ranks, few=ranks)["BatchNorm"][1] * 1e3 for ranks in RANKS]
        axes.plot(RANKS, gathered, ":", color="C2", label="BatchNorm, gathered")
        axes.set(xscale="log", yscale="log", xlabel="ranks", title=name)
        axes.set_xticks(RANKS, [str(n) for n in RANKS], minor=False)
        axes.minorticks_off()
        axes.legend()
    figure.axes[0].set_ylabel("ms a step (computed)\nsolid: InfiniBand, dashed: Ethernet")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="of each collective that is timed; the best counts")
    parser.add_argument("--prefer", action="store_true", help="time with preference over what else runs here; as root")
    asked = parser.parse_args()
    with preferred(asked.prefer):
        times = timed_rows(asked.rounds)
    counted = counted_rows()
    plot(HERE / "scaling.png")
    ranks = [f"{n} ranks" for n in TIMED]
    within = sum(x <= 1.3 for x in times.off)
    simulations = "\n\n".join(
        f"{link.name}, {name}:\n\n"
        + table(
            (
                "ranks",
                "global batch",
                "gradients",
                "embeddings",
                "global BatchNorm",
                "all collectives",
                "norms gathered",
            ),
            simulated_rows(link, images),
        )
        for link in (H100, ETHERNET)
        for name, images in SETTINGS.items()
    )
    most = [simulated(link, 64 * RANKS[-1], RANKS[-1]) for link in (H100, ETHERNET)]
    norms, gradients = ([parts[what][1] for parts in most] for what in ("BatchNorm", "gradients"))
    gathered = simulated(H100, 64 * RANKS[-1], RANKS[-1], few=RANKS[-1])["BatchNorm"][1]
    text = f"""# Scaling: what a step sends, and how long that takes

By `python -m benchmarks.scaling`, which says how.

## Counted

Each collective of one step (DeepSpeed engine, gloo; SimCLR, six convolutions of width 16, {SAMPLES} images of a rank)
was counted in the real calls; the formula gives the same list of kinds and sizes, call by call, or the benchmark stops.
Bytes that a rank sends, by rings:

{table(("ranks", "BatchNorm", "calls", "all-reduce", "all-gather", "the formula, in all"), counted)}

## The model's form

A collective takes its hops' latency and its bytes over the bandwidth (`trainer/costs/collective_time.py`). On this
machine ranks share {len(os.sched_getaffinity(0))} processors and take turns for the work of a hop, so its latency is
multiplied by the ranks of a processor. Two constants were fitted at 2 and 8 ranks:
{"; ".join(times.constants)}.
Asked for 3, 4 and 6 ranks, the model is off by {times.off[len(times.off) // 2]:.2f} times in the median, by
{times.off[-1]:.1f} at worst; {within} of {len(times.off)} times are within 1.3. What remains: a hop's work does not
grow quite in proportion to the ranks of a processor, 16 MiB take longer a byte than 4 MiB, and what else ran on the
machine shows in single times. Milliseconds, measured (model):

{table(("", "KiB", *ranks), times.collectives)}

The sums of a norm of {CHANNELS} channels, {8 * (2 * CHANNELS + 1):,} bytes, in ms by both ways of `across.small_sum`:

{table(("", *ranks), times.sums)}

## Computed to 1024 ranks

Nothing in this section was measured. SimCLR with ResNet-50, fp32 on the wire, none of it hidden behind computing.
Bandwidths are the makers': {H100.bandwidth / 1e9:.0f} GB/s one way by NVLink, {H100.between_bandwidth / 1e9:.0f} GB/s
by InfiniBand. Latencies are a plan's (`docs/plan.md`): {H100.latency * 1e6:.1f} µs in a machine,
{H100.between_latency * 1e6:.0f} µs by InfiniBand; {ETHERNET.between_latency * 1e6:.0f} µs by Ethernet are assumed. In
each cell: bytes that a rank sends, and the time. The last column is what the norms would take, were their sums gathered
on any number of ranks.

{simulations}

![Time of collectives against ranks](scaling.png)

A norm's sums, two numbers a channel, are gathered by up to {across.FEW} ranks, which takes half the hops of an
all-reduce, and reduced by more, in hops that grow with the logarithm of the machines. With InfiniBand and
{RANKS[-1]} ranks all norms of ResNet-50 take {norms[0] * 1e3:.1f} ms, {norms[0] / gradients[0]:.1f} times the
gradients' time; gathered they would take {gathered * 1e3:.0f}. With Ethernet they take
{norms[1] / gradients[1]:.2f} times the gradients' time. `encoder.norm=local` has none of it.

"""
    (HERE / "scaling.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
