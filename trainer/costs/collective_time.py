"""What collectives send and how long that takes: rings, and trees where they are quicker. Pure numbers."""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


@dataclass(frozen=True)
class Call:
    """One collective of a step, as every rank makes it.

    size: bytes of the whole: the tensor that is reduced, the one that has been gathered, the one that is scattered.
    """

    what: str
    kind: Kind
    size: int


@dataclass(frozen=True)
class Link:
    """How ranks are joined: bytes per second that a rank sends, and seconds from one rank to the next.

    node: ranks of a machine; inside it they send by the first pair, between machines by the second.
    """

    name: str
    node: int
    bandwidth: float
    latency: float
    between_bandwidth: float
    between_latency: float


def sent(kind: Kind, size: int, ranks: int) -> float:
    """Bytes that each rank sends: by a ring, which is the least that any algorithm can do with all ranks alike
    (Patarasuk and Yuan 2009, doi.org/10.1016/j.jpdc.2008.09.002). size as in Call."""
    return (2 if kind == "all_reduce" else 1) * (ranks - 1) / ranks * size


def hops(kind: Kind, ranks: int) -> int:
    """From rank to rank, one after another, in a ring. All to all goes straight, one hop for each of the others."""
    return (2 if kind == "all_reduce" else 1) * (ranks - 1)


def seconds(kind: Kind, size: int, ranks: int, link: Link) -> float:
    """Latency and bytes of a ring; of an all-reduce the better of that and a double binary tree (Sanders et al. 2009,
    doi.org/10.1016/j.parco.2009.09.001): 2 log2 of the machines' number of hops, and twice the bytes.

    Each part of a ring's data passes from rank to rank, and from machine to machine once (all-reduce: twice) for each
    of the others, as in NCCL's own model (github.com/NVIDIA/nccl, src/graph/tuning.cc). A ring over several machines
    goes at its slowest rank's rate, a machine's ranks each with a way out of their own.
    """
    if ranks == 1:
        return 0.0
    machines = math.ceil(ranks / link.node)
    rate = link.bandwidth if machines == 1 else min(link.bandwidth, link.between_bandwidth)
    between = max(0, ranks - link.node) if kind == "all_to_all" else hops(kind, machines)  # of the hops
    hopping = (hops(kind, ranks) - between) * link.latency + between * link.between_latency
    ring = hopping + sent(kind, size, ranks) / rate
    if kind != "all_reduce" or machines == 1:
        return ring
    inside = 2 * (min(ranks, link.node) - 1) * link.latency
    tree = 2 * math.ceil(math.log2(machines)) * link.between_latency + inside + 2 * size / rate
    return min(ring, tree)
