"""What a machine could do at best, and the rows of `kilobatch bench`."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """rate: of ours, limit: the most that the machine gives, measured in the same run, both in `unit` a second."""

    what: str
    rate: float
    limit: float
    unit: str
    limited_by: str


def best(work: Callable[[], object], device: torch.device, seconds: float = 1.0, least: int = 3) -> float:
    """Seconds of the quickest of several runs, after one that warms up."""
    run(work, device)
    end, found = time.perf_counter() + seconds, []
    while len(found) < least or time.perf_counter() < end:
        found.append(run(work, device))
    return min(found)


def run(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the clock."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def gemm(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second of a product of square matrices."""
    side = 2048 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device, dtype=dtype)
    out = torch.empty_like(a)
    return 2 * side**3 / best(lambda: torch.mm(a, a, out=out), device)


def copying(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    a = torch.ones(2**26, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * len(a) / best(lambda: b.copy_(a), device, 0.5)
