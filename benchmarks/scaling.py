"""Bytes and seconds of a step's collectives on up to 1024 ranks: counted at 2, 4 and 8 ranks, computed beyond.

    python -m benchmarks.scaling           # some minutes; writes scaling.md and scaling.png next to this file

Counted: every collective of one real step (DeepSpeed engine, gloo, SimCLR, the demo's encoder), by kind and size; the
formula must give the same list. Timed: all-reduce and all-gather of several sizes on this machine's gloo, one after the
other as in a step. The model's two constants are fitted at 2 and 8 ranks, and the model is then compared with the times
at 3, 4 and 6.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.cached import table
from benchmarks.step_collectives import PARTS, SAMPLES, counted_rows, simulated
from kilobatch.launch.planning.machines import HOPS
from kilobatch.methods import collectives
from kilobatch.trainer.costs.collective_time import Kind, Link, seconds
from kilobatch.trainer.ranks.spawn import run_ranks

RANKS_TIMED, RANKS_FITTED = (2, 3, 4, 6, 8), (2, 8)
CHANNELS = 512  # of a norm whose sums are timed
RANKS = [2**k for k in range(3, 11)]  # computed
SIZES = [2**k for k in (12, 14, 16, 18, 20, 22, 24)]  # bytes
FOLDER = Path(__file__).parent
# Bandwidths are the makers' (NVIDIA H100 SXM: NVLink 900 GB/s both ways; NDR InfiniBand 400 Gb/s, one adapter to a
# GPU), latencies those of `kilobatch plan`; Ethernet's is assumed.
H100 = Link("H100, NVLink and NDR InfiniBand", 8, 450e9, HOPS[0], 50e9, HOPS[1])
ETHERNET = Link("the same GPUs, 100 Gb/s Ethernet to each node of 8", 8, 450e9, HOPS[0], 12.5e9 / 8, 20e-6)
SETTINGS = {  # global batch by ranks
    "64 images a rank": lambda ranks: 64 * ranks,
    "4096 images in all": lambda ranks: 4096,
}


@contextmanager
def preferred(enabled: bool) -> Iterator[None]:
    """Runs this session's processes with preference over others (Linux's autogroup; needs to be root)."""
    group = Path("/proc/self/autogroup")
    if enabled:
        group.write_text("-20")
    yield
    if enabled:
        group.write_text("0")


def timed(rounds: int) -> tuple[dict[tuple[Kind, int], float], dict[str, float]]:
    """Seconds of a collective by kind and size, and of a norm's sums by both branches of collectives.all_reduce_small.

    Each is the average over several calls in a row, in the best of the rounds.
    """

    def best(run: Callable[[], Any], calls: int) -> float:
        quickest = float("inf")
        for _ in range(rounds):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            quickest = min(quickest, (time.perf_counter() - start) / calls)
        return collectives.all_reduce_max(torch.tensor(quickest)).item()

    times: dict[tuple[Kind, int], float] = {}
    for size in SIZES:
        part = torch.zeros(size // 4 // collectives.world_size())
        whole = torch.zeros(len(part) * collectives.world_size())
        calls = 10 if size <= 2**18 else 2
        times["all_reduce", size] = best(lambda x=whole: dist.all_reduce(x), calls)
        times["all_gather", size] = best(lambda x=whole, y=part: dist.all_gather_into_tensor(x, y), calls)
    sums = torch.zeros(2 * CHANNELS + 1, dtype=torch.float64)
    sum_times = {}
    for branch, few in (("gathered", collectives.world_size()), ("reduced", 1)):
        with mock.patch.object(collectives, "FEW_RANKS", few):
            sum_times[branch] = best(lambda: collectives.all_reduce_small(sums), 10)
    return times, sum_times


def predicted(kind: Kind, size: int, ranks: int, latency: float, bandwidth: float) -> float:
    """Seconds by the model, on this machine.

    A hop is work for a processor, for which ranks take turns if they outnumber the processors, so latency is multiplied
    by the ranks of a processor. Bandwidth is not: two ranks alone leave two processors idle half of the time, waiting
    for each other.
    """
    turns = max(1.0, ranks / len(os.sched_getaffinity(0)))
    return seconds(kind, size, ranks, Link("gloo", 10**6, bandwidth, turns * latency, bandwidth, turns * latency))


def fit(times: dict[int, dict[tuple[Kind, int], float]], kind: Kind) -> tuple[float, float]:
    """The latency and bandwidth with the least squared error of log times at RANKS_FITTED, by search over a grid."""

    def error(constants: tuple[float, float]) -> float:
        points = [
            (predicted(kind, size, ranks, *constants), times[ranks][kind, size])
            for ranks in RANKS_FITTED
            for size in SIZES
        ]
        return sum(math.log(model / measured) ** 2 for model, measured in points)

    grid = product(torch.logspace(-5, -2.5, 101).tolist(), torch.logspace(7.5, 10.5, 121).tolist())
    return min(grid, key=error)


@dataclass(frozen=True)
class Timings:
    """Rows of the two tables of times.

    errors: by what factor the model is too high or too low, at the ranks at which it was not fitted; sorted.
    """

    collectives: list[tuple[str, ...]]
    sums: list[tuple[str, ...]]
    constants: list[str]
    errors: list[float]


def timed_rows(rounds: int) -> Timings:
    runs = {ranks: run_ranks(ranks, timed, rounds, timeout=900.0)[0] for ranks in RANKS_TIMED}
    times = {ranks: of_collectives for ranks, (of_collectives, _) in runs.items()}
    rows, constants, errors = [], [], []
    for kind in ("all_reduce", "all_gather"):
        latency, bandwidth = fit(times, kind)
        constants.append(f"{kind} {latency * 1e6:.0f} µs a hop and {bandwidth / 1e9:.2f} GB/s")
        for size in SIZES:
            row = [kind, f"{size // 1024:,}"]
            for ranks in RANKS_TIMED:
                model, measured = predicted(kind, size, ranks, latency, bandwidth), times[ranks][kind, size]
                row.append(f"{measured * 1e3:.2f} ({model * 1e3:.2f})")
                if ranks not in RANKS_FITTED:
                    errors.append(max(model / measured, measured / model))
            rows.append(tuple(row))
    sums = [
        (branch, *(f"{runs[ranks][1][branch] * 1e3:.2f}" for ranks in RANKS_TIMED))
        for branch in ("gathered", "reduced")
    ]
    return Timings(rows, sums, constants, sorted(errors))


def simulated_rows(link: Link, images: Callable[[int], int]) -> list[tuple[str, ...]]:
    rows = []
    for ranks in RANKS:
        of_parts = simulated(link, images(ranks), ranks)
        cells = [f"{of_parts[part][0] / 1e6:.1f} MB, {of_parts[part][1] * 1e3:.2f} ms" for part in PARTS]
        gathered = simulated(link, images(ranks), ranks, few=ranks)["BatchNorm"][1]
        total = of_parts["all"][1]
        rows.append((f"{ranks}", f"{images(ranks):,}", *cells, f"{total * 1e3:.1f} ms", f"{gathered * 1e3:.2f} ms"))
    return rows


def plot(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=90, layout="constrained")
    for axes, (name, images) in zip(figure.subplots(1, 2, sharey=True), SETTINGS.items(), strict=True):
        for link, style in ((H100, "-"), (ETHERNET, "--")):
            by_ranks = [simulated(link, images(ranks), ranks) for ranks in RANKS]
            for k, part in enumerate(PARTS):
                times = [of_parts[part][1] * 1e3 for of_parts in by_ranks]
                axes.plot(RANKS, times, style, color=f"C{k}", label=part if link is H100 else None)
        gathered = [simulated(H100, images(ranks), ranks, few=ranks)["BatchNorm"][1] * 1e3 for ranks in RANKS]
        axes.plot(RANKS, gathered, ":", color="C2", label="BatchNorm, gathered")
        axes.set(xscale="log", yscale="log", xlabel="ranks", title=name)
        axes.set_xticks(RANKS, [str(n) for n in RANKS], minor=False)
        axes.minorticks_off()
        axes.legend()
    figure.axes[0].set_ylabel("ms a step (computed)\nsolid: InfiniBand, dashed: Ethernet")
    figure.savefig(path)


def measured_text(counted: list[tuple[str, ...]], times: Timings) -> str:
    ranks = [f"{n} ranks" for n in RANKS_TIMED]
    within = sum(x <= 1.3 for x in times.errors)
    return f"""# Scaling: what a step sends, and how long that takes

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
Asked for 3, 4 and 6 ranks, the model is off by {times.errors[len(times.errors) // 2]:.2f} times in the median, by
{times.errors[-1]:.1f} at worst; {within} of {len(times.errors)} times are within 1.3. What remains: a hop's work does
not grow quite in proportion to the ranks of a processor, 16 MiB take longer a byte than 4 MiB, and what else ran on the
machine shows in single times. Milliseconds, measured (model):

{table(("", "KiB", *ranks), times.collectives)}

The sums of a norm of {CHANNELS} channels, {8 * (2 * CHANNELS + 1):,} bytes, in ms by both branches of
`collectives.all_reduce_small`:

{table(("", *ranks), times.sums)}
"""


def computed_text() -> str:
    parts = ("gradients", "embeddings", "global BatchNorm")
    header = ("ranks", "global batch", *parts, "all collectives", "norms gathered")
    simulations = "\n\n".join(
        f"{link.name}, {name}:\n\n{table(header, simulated_rows(link, images))}"
        for link in (H100, ETHERNET)
        for name, images in SETTINGS.items()
    )
    most = [simulated(link, 64 * RANKS[-1], RANKS[-1]) for link in (H100, ETHERNET)]
    norms, gradients = ([parts[what][1] for parts in most] for what in ("BatchNorm", "gradients"))
    gathered = simulated(H100, 64 * RANKS[-1], RANKS[-1], few=RANKS[-1])["BatchNorm"][1]
    return f"""## Computed to 1024 ranks

Nothing in this section was measured. SimCLR with ResNet-50, fp32 on the wire, none of it hidden behind computing.
Bandwidths are the makers': {H100.bandwidth / 1e9:.0f} GB/s one way by NVLink, {H100.between_bandwidth / 1e9:.0f} GB/s
by InfiniBand. Latencies are a plan's (`docs/plan.md`): {H100.latency * 1e6:.1f} µs in a machine,
{H100.between_latency * 1e6:.0f} µs by InfiniBand; {ETHERNET.between_latency * 1e6:.0f} µs by Ethernet are assumed. In
each cell: bytes that a rank sends, and the time. The last column is what the norms would take, were their sums gathered
on any number of ranks.

{simulations}

![Time of collectives against ranks](scaling.png)

A norm's sums, two numbers a channel, are gathered by up to {collectives.FEW_RANKS} ranks, which takes half the hops of
an all-reduce, and reduced by more, in hops that grow with the logarithm of the machines. With InfiniBand and
{RANKS[-1]} ranks all norms of ResNet-50 take {norms[0] * 1e3:.1f} ms, {norms[0] / gradients[0]:.1f} times the
gradients' time; gathered they would take {gathered * 1e3:.0f}. With Ethernet they take
{norms[1] / gradients[1]:.2f} times the gradients' time. `encoder.norm=local` has none of it.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="of each collective that is timed; the best counts")
    parser.add_argument("--prefer", action="store_true", help="time with preference over what else runs here; as root")
    options = parser.parse_args()
    with preferred(options.prefer):
        times = timed_rows(options.rounds)
    counted = counted_rows()
    plot(FOLDER / "scaling.png")
    text = f"{measured_text(counted, times)}\n{computed_text()}"
    (FOLDER / "scaling.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
