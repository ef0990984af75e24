"""Measures collectives over this machine's ranks, with its memory bandwidth as their limit."""

import torch
import torch.distributed as dist

from kilobatch.trainer.bench.rates import BenchRow, copy_rate, run
from kilobatch.trainer.costs.collective_time import Kind, hops, sent
from kilobatch.trainer.ranks.spawn import run_ranks

SIZE, SMALL = 2**25, 2**10  # bytes
ROUNDS = 7  # of each collective; the quickest counts


def rows(device: torch.device, ranks: int) -> tuple[list[BenchRow], dict[str, float]]:
    """The rows, and for a plan `link`, bytes that a rank sends a second, and `latency`, seconds a hop."""
    of_ranks = run_ranks(ranks, _measure, device.type)
    seconds = {name: max(times[name] for times in of_ranks) for name in of_ranks[0]}
    limit = copy_rate(device)
    table: list[BenchRow] = []
    kinds: dict[str, Kind] = {"all-gather": "all_gather", "all-reduce": "all_reduce"}
    for name, kind in kinds.items():
        what = f"{name} of {SIZE >> 20} MiB, {ranks} ranks"
        table.append(BenchRow(what, sent(kind, SIZE, ranks) / seconds[name], limit, "B", "copy within memory"))
    link = sent("all_reduce", SIZE, ranks) / seconds["all-reduce"]
    return table, {"link": link, "latency": seconds["small"] / hops("all_reduce", ranks)}


def _measure(kind: str) -> dict[str, float]:
    """Seconds of each collective's quickest round, on this rank. GPUs use a second group, by NCCL."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", rank)
    if kind == "cuda":
        torch.cuda.set_device(device)
    group = dist.group.WORLD
    if kind == "cuda":
        nccl = dist.new_group(backend="nccl")
        assert isinstance(nccl, dist.ProcessGroup)
        group = nccl
    whole, small = torch.zeros(SIZE // 4, device=device), torch.zeros(SMALL // 4, device=device)
    part = torch.zeros(SIZE // 4 // ranks, device=device)
    gathered = torch.zeros(len(part) * ranks, device=device)
    works = {
        "all-gather": lambda: dist.all_gather_into_tensor(gathered, part, group=group),
        "all-reduce": lambda: dist.all_reduce(whole, group=group),
        "small": lambda: dist.all_reduce(small, group=group),
    }
    quickest = {}
    for name, work in works.items():
        times = []
        for _ in range(ROUNDS):
            dist.barrier()
            times.append(run(work, device))
        quickest[name] = min(times)
    return quickest
