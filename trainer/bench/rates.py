"""Measures a machine's own rates (matrix products, copies), and defines the rows of `kilobatch bench`."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BenchRow:
    """One measurement. rate: of this project's code; limit: what the machine reaches, measured in the same run.

    Both are in `unit` a second. limited_by: what the limit is the rate of.
    """

    what: str
    rate: float
    limit: float
    unit: str
    limited_by: str


def best(work: Callable[[], object], device: torch.device, seconds: float = 1.0, least: int = 3) -> float:
    """Seconds of the quickest run, after one for warm-up. Runs work for so many seconds, and at least `least` times."""
    run(work, device)
    end, times = time.perf_counter() + seconds, []
    while len(times) < least or time.perf_counter() < end:
        times.append(run(work, device))
    return min(times)


def run(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, by the clock."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def gemm(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations a second in a product of square matrices."""
    side = 2048 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device, dtype=dtype)
    out = torch.empty_like(a)
    return 2 * side**3 / best(lambda: torch.mm(a, a, out=out), device)


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy within memory reads and writes."""
    a = torch.ones(2**26, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * len(a) / best(lambda: b.copy_(a), device, 0.5)
