"""Bytes and seconds of collectives, computed for rings, and for trees where these are quicker."""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


@dataclass(frozen=True)
class Link:
    """A network between ranks.

    node: ranks of a machine. bandwidth: bytes per second that a rank sends; latency: seconds from a rank to the next.
    bandwidth and latency hold inside a machine, between_bandwidth and between_latency from one
    machine to another.
    """

    name: str
    node: int
    bandwidth: float
    latency: float
    between_bandwidth: float
    between_latency: float


def sent(kind: Kind, size: int, ranks: int) -> float:
    """Bytes that each rank sends in a ring, which is the least that any algorithm can do with all ranks alike
    (Patarasuk and Yuan 2009, doi.org/10.1016/j.jpdc.2008.09.002).

    size: bytes of the whole tensor: before it is reduced or scattered, after it is gathered.
    """
    return (2 if kind == "all_reduce" else 1) * (ranks - 1) / ranks * size


def hops(kind: Kind, ranks: int) -> int:
    """Hops from rank to rank in a ring, one after another; in an all-to-all, one hop to each of the other ranks."""
    return (2 if kind == "all_reduce" else 1) * (ranks - 1)


def seconds(kind: Kind, size: int, ranks: int, link: Link) -> float:
    """Seconds of a collective: latency of its hops and bytes over bandwidth, in a ring.

    An all-reduce takes the smaller of that and the time of a double binary tree (Sanders et al. 2009,
    doi.org/10.1016/j.parco.2009.09.001), which has 2 log2(machines) hops between machines and sends twice the bytes.
    As in NCCL's own model (github.com/NVIDIA/nccl, src/graph/tuning.cc), each part of a ring's data passes from rank to
    rank, and between machines once (all-reduce: twice) for each of the other machines. A ring over several machines
    runs at the rate of its slowest rank, where each rank of a machine has a network adapter of its own.
    """
    if ranks == 1:
        return 0.0
    machines = math.ceil(ranks / link.node)
    rate = link.bandwidth if machines == 1 else min(link.bandwidth, link.between_bandwidth)
    between = max(0, ranks - link.node) if kind == "all_to_all" else hops(kind, machines)  # hops between machines
    latency = (hops(kind, ranks) - between) * link.latency + between * link.between_latency
    ring = latency + sent(kind, size, ranks) / rate
    if kind != "all_reduce" or machines == 1:
        return ring
    inside = 2 * (min(ranks, link.node) - 1) * link.latency
    tree = 2 * math.ceil(math.log2(machines)) * link.between_latency + inside + 2 * size / rate
    return min(ring, tree)
