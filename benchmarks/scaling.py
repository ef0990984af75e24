"""What a step sends, and how long its collectives take, up to 1024 ranks: counted at 2, 4 and 8, computed beyond.

    python -m benchmarks.scaling           # some minutes; writes scaling.md and scaling.png beside this file

Counted: every collective of one real step (DeepSpeed engine, gloo, SimCLR, the demo's encoder), by kind and size; the
formula must give the same list. Timed: all-reduce and all-gather of several sizes on this machine's gloo; the model's
two constants are fitted at 2 and 8 ranks and then asked for 4.
"""

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.cached import table
from data.batch import Batch
from methods import across, norm
from methods.convnet import ConvNet
from methods.encoder_options import Mode
from methods.resnet import ResNet
from methods.simclr import SimCLR
from trainer.engine import Engine
from trainer.options import EngineOptions
from trainer.ranks import run_ranks
from trainer.step import check_finite, forward_backward
from trainer.traffic import Call, Kind, Link, seconds, sent

SAMPLES, DIM, SIDE = 16, 128, 32
COUNTED = 2, 4, 8
RANKS = [2**k for k in range(3, 11)]  # computed
FLAGS = 2  # that check_finite agrees on besides: a signal, a checkpoint
SIZES = [2**k for k in (12, 14, 16, 18, 20, 22, 24)]  # bytes
HERE = Path(__file__).parent
# Bandwidths are the makers' (NVIDIA H100 SXM: NVLink 900 GB/s both ways; NDR InfiniBand 400 Gb/s, one adapter to a
# GPU); latencies are assumed.
H100 = Link("H100, NVLink and NDR InfiniBand", 8, 450e9, 2e-6, 50e9, 5e-6)
ETHERNET = Link("the same GPUs, 100 Gb/s Ethernet to each node of 8", 8, 450e9, 2e-6, 12.5e9 / 8, 20e-6)


def formula(method: SimCLR, samples: int, ranks: int, mode: Mode) -> list[Call]:
    """The collectives of one step of SimCLR, in fp32; samples: of a rank."""
    channels = [len(m.running_mean) for m in norm.norms(method)]
    calls = [
        Call("gradients", "all_reduce", 4 * sum(p.numel() for p in method.parameters())),
        Call("embeddings", "all_gather", 4 * ranks * 2 * samples * DIM),
        Call("log-sum-exps", "all_gather", 4 * ranks * 2 * samples),
        Call("running statistics", "all_reduce", 4 * sum(2 * c + 1 for c in channels)),
        Call("are all finite, signals", "all_reduce", 8 * (2 * ranks + FLAGS)),
    ]
    if mode == "global":
        calls += [Call("BatchNorm, forward", "all_gather", 4 * ranks * 3 * c) for c in channels]
        calls += [Call("BatchNorm, backward", "all_reduce", 4 * 2 * c) for c in channels]
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


def timed(rounds: int) -> dict[tuple[Kind, int], float]:
    """Seconds of a collective, the best of its rounds on the slowest rank."""
    found: dict[tuple[Kind, int], float] = {}
    for size in SIZES:
        whole = torch.zeros(size // 4)
        part = torch.zeros(size // 4 // across.size())
        runs: dict[Kind, Callable[[], Any]] = {
            "all_reduce": lambda x=whole: dist.all_reduce(x),
            "all_gather": lambda x=whole, y=part: dist.all_gather_into_tensor(x, y),
        }
        for kind, run in runs.items():
            best = float("inf")
            for _ in range(rounds):
                dist.barrier()
                start = time.perf_counter()
                run()
                best = min(best, across.all_max(torch.tensor(time.perf_counter() - start)).item())
            found[kind, size] = best
    return found


def shared(ranks: int) -> float:
    """How many ranks wait for one processor: they copy, and go from hop to hop, in turns."""
    return max(1.0, ranks / len(os.sched_getaffinity(0)))


def fit(times: dict[int, dict[tuple[Kind, int], float]], kind: Kind, ranks: tuple[int, ...]) -> Link:
    """The latency and bandwidth that come nearest to the logarithms of the times, by search."""
    points = [(w, size, times[w][kind, size]) for w in ranks for size in SIZES]
    best, link = float("inf"), H100
    for latency in torch.logspace(-5, -2.5, 101).tolist():
        for bandwidth in torch.logspace(7.5, 10.5, 121).tolist():
            tried = Link("gloo, this machine", 10**6, bandwidth, latency, bandwidth, latency)
            told = torch.tensor([shared(w) * seconds(kind, size, w, tried) for w, size, _ in points])
            off = (told.log() - torch.tensor([t for *_, t in points]).log()).square().sum().item()
            if off < best:
                best, link = off, tried
    return link


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


def timed_rows(rounds: int) -> tuple[list[tuple[str, ...]], list[str], float]:
    """The table, the constants, and how many times the model is too high or too low at worst for 4 ranks."""
    times = {ranks: run_ranks(ranks, timed, rounds, timeout=900.0)[0] for ranks in COUNTED}
    rows, links, worst = [], [], 1.0
    for kind in ("all_reduce", "all_gather"):
        link = fit(times, kind, (2, 8))
        links.append(f"{kind} {link.latency * 1e6:.0f} µs a hop and {link.bandwidth / 1e9:.2f} GB/s")
        for size in SIZES:
            row = [kind, f"{size // 1024:,}"]
            for ranks in COUNTED:
                told = shared(ranks) * seconds(kind, size, ranks, link)
                row.append(f"{times[ranks][kind, size] * 1e3:.2f} ({told * 1e3:.2f})")
                if ranks == 4:
                    worst = max(worst, told / times[ranks][kind, size], times[ranks][kind, size] / told)
            rows.append(tuple(row))
    return rows, links, worst


def resnet50(mode: Mode) -> SimCLR:
    with torch.device("meta"):
        return SimCLR(ResNet("resnet50", "imagenet", mode), temperature=0.1, dim=DIM)


SETTINGS = {  # global batch by ranks
    "64 images a rank": lambda ranks: 64 * ranks,
    "4096 images in all": lambda ranks: 4096,
}


def simulated(link: Link, images: Callable[[int], int], mode: Mode) -> dict[int, dict[str, tuple[float, float]]]:
    """By ranks and by what: bytes sent and seconds, of all its calls in a step of SimCLR with ResNet-50."""
    method, found = resnet50(mode), {}
    for ranks in RANKS:
        parts: dict[str, tuple[float, float]] = {}
        for call in formula(method, images(ranks) // ranks, ranks, mode):
            size, time = parts.get(call.what, (0.0, 0.0))
            size += sent(call.kind, call.size, ranks)
            parts[call.what] = size, time + seconds(call.kind, call.size, ranks, link)
        found[ranks] = parts
    return found


def simulated_rows(link: Link, images: Callable[[int], int]) -> list[tuple[str, ...]]:
    rows = []
    for ranks, parts in simulated(link, images, "global").items():
        norms = [parts.pop("BatchNorm, forward"), parts.pop("BatchNorm, backward")]
        shown = [parts["gradients"], parts["embeddings"], (sum(s for s, _ in norms), sum(t for _, t in norms))]
        total = sum(t for _, t in (*parts.values(), *norms))
        cells = [f"{size / 1e6:.1f} MB, {time * 1e3:.2f} ms" for size, time in shown]
        rows.append((f"{ranks}", f"{images(ranks):,}", *cells, f"{total * 1e3:.1f} ms"))
    return rows


def plot(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=90, layout="constrained")
    for axes, (name, images) in zip(figure.subplots(1, 2, sharey=True), SETTINGS.items(), strict=True):
        for link, style in ((H100, "-"), (ETHERNET, "--")):
            for what, calls in {
                "gradients": ("gradients",),
                "embeddings": ("embeddings", "log-sum-exps"),
                "BatchNorm": ("BatchNorm, forward", "BatchNorm, backward"),
            }.items():
                found = simulated(link, images, "global")
                times = [sum(parts[call][1] for call in calls) * 1e3 for parts in found.values()]
                colour = {"gradients": "C0", "embeddings": "C1", "BatchNorm": "C2"}[what]
                axes.plot(RANKS, times, style, color=colour, label=what if link is H100 else None)
        axes.set(xscale="log", yscale="log", xlabel="ranks", title=name)
        axes.set_xticks(RANKS, [str(n) for n in RANKS], minor=False)
        axes.minorticks_off()
        axes.legend()
    figure.axes[0].set_ylabel("ms a step (computed)\nsolid: InfiniBand, dashed: Ethernet")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="of each collective that is timed; the best counts")
    asked = parser.parse_args()
    counted = counted_rows()
    times, constants, worst = timed_rows(asked.rounds)
    plot(HERE / "scaling.png")
    ranks = [f"{n} ranks" for n in COUNTED]
    simulations = "\n\n".join(
        f"{link.name}, {name}:\n\n"
        + table(
            ("ranks", "global batch", "gradients", "embeddings", "global BatchNorm", "all collectives"),
            simulated_rows(link, images),
        )
        for link in (H100, ETHERNET)
        for name, images in SETTINGS.items()
    )
    text = f"""# Scaling: what a step sends, and how long that takes

By `python -m benchmarks.scaling`, which says how.

## Counted

Each collective of one step (DeepSpeed engine, gloo; SimCLR, six convolutions of width 16, {SAMPLES} images of a rank)
was counted in the real calls; the formula gives the same list of kinds and sizes, call by call, or the benchmark stops.
Bytes that a rank sends, by rings:

{table(("ranks", "BatchNorm", "calls", "all-reduce", "all-gather", "the formula, in all"), counted)}

## The model's form

A collective takes its hops' latency and its bytes over the bandwidth (`trainer/traffic.py`). On this machine ranks
share {len(os.sched_getaffinity(0))} processors, and take turns. Two constants, fitted at 2 and 8 ranks, and asked for 4
as well, where the model is off by up to {worst:.1f} times: {"; ".join(constants)}. What else
runs on the machine shows in these times. Milliseconds, measured (model):

{table(("", "KiB", *ranks), times)}

## Computed to 1024 ranks

Nothing in this section was measured. SimCLR with ResNet-50, fp32 on the wire, none of it hidden behind computing.
Bandwidths are the makers': {H100.bandwidth / 1e9:.0f} GB/s one way by NVLink, {H100.between_bandwidth / 1e9:.0f} GB/s
by InfiniBand. Latencies are assumed: {H100.latency * 1e6:.0f} µs in a machine, {H100.between_latency * 1e6:.0f} µs
by InfiniBand, {ETHERNET.between_latency * 1e6:.0f} µs by Ethernet. In each cell: bytes that a rank sends, and the time.

{simulations}

![Time of collectives against ranks](scaling.png)

In this model a ring's latency grows with the ranks, and global BatchNorm pays it once for each norm: it takes more time
than the gradients do with InfiniBand, and from 128 ranks on with Ethernet. `encoder.norm=local` has none of it.

"""
    (HERE / "scaling.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
