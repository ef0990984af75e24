"""Collectives over this machine's ranks, with its memory bandwidth as their limit."""

import torch
import torch.distributed as dist

from kilobatch.trainer.bench.rates import Row, copying, run
from kilobatch.trainer.costs.collective_time import Kind, hops, sent
from kilobatch.trainer.ranks.spawn import run_ranks

SIZE, SMALL, TURNS = 2**25, 2**10, 7  # bytes


def rows(device: torch.device, ranks: int) -> tuple[list[Row], dict[str, float]]:
    """Returns the rows, and for a plan `link`, bytes that a rank sends a second, and `latency`, seconds a hop."""
    found = run_ranks(ranks, _measure, device.type)
    seconds = {name: max(times[name] for times in found) for name in found[0]}
    limit = copying(device)
    table: list[Row] = []
    kinds: dict[str, Kind] = {"all-gather": "all_gather", "all-reduce": "all_reduce"}
    for name, kind in kinds.items():
        what = f"{name} of {SIZE >> 20} MiB, {ranks} ranks"
        table.append(Row(what, sent(kind, SIZE, ranks) / seconds[name], limit, "B", "copy within memory"))
    link = sent("all_reduce", SIZE, ranks) / seconds["all-reduce"]
    return table, {"link": link, "latency": seconds["small"] / hops("all_reduce", ranks)}


def _measure(kind: str) -> dict[str, float]:
    """Seconds of the quickest turn, on this rank. GPUs have a group of their own beside the one that met."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", rank)
    if kind == "cuda":
        torch.cuda.set_device(device)
    group = dist.group.WORLD
    if kind == "cuda":
        found = dist.new_group(backend="nccl")
        assert isinstance(found, dist.ProcessGroup)
        group = found
    whole, small = torch.zeros(SIZE // 4, device=device), torch.zeros(SMALL // 4, device=device)
    part = torch.zeros(SIZE // 4 // ranks, device=device)
    gathered = torch.zeros(len(part) * ranks, device=device)
    works = {
        "all-gather": lambda: dist.all_gather_into_tensor(gathered, part, group=group),
        "all-reduce": lambda: dist.all_reduce(whole, group=group),
        "small": lambda: dist.all_reduce(small, group=group),
    }
    found = {}
    for name, work in works.items():
        times = []
        for _ in range(TURNS):
            dist.barrier()
            times.append(run(work, device))
        found[name] = min(times)
    return found
