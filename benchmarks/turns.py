"""Measures losses on one CPU thread, each against the others: seconds, and memory at the peak.

Each measurement is a process of its own; the losses take turns, and the best round counts. Seconds are those of the CPU
(with one thread those of the clock, on an idle machine), the best of three calls after a first one, as in training.
Memory is the resident memory at the first call's peak (VmHWM, reset before) less the resident memory before it. Between
the calls the process measures the rate of the thread's fp32 matrix products, because it changes within seconds.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

NAMES = ("ours", "plain", "lightly")


@dataclass(frozen=True)
class Turn:
    seconds: float  # of one forward and backward
    bytes: int
    gemm: float  # floating-point operations per second of a product of 2048^3
    loss: float


def measure(loss: Callable[[], Tensor]) -> Turn:
    """Measures a loss and its backward, which have run before on smaller inputs."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    value = loss()
    value.backward()
    peak = resident("VmHWM") - before
    a, product, seconds = torch.randn(2048, 2048), float("inf"), float("inf")
    for _ in range(3):
        start = time.process_time()
        loss().backward()
        middle = time.process_time()
        torch.mm(a, a)
        seconds, product = min(seconds, middle - start), min(product, time.process_time() - middle)
    return Turn(seconds, peak, 2 * 2048**3 / product, value.item())


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def arguments(description: str | None, sizes: str, default: list[int]) -> argparse.Namespace:
    """The command line of a benchmark: its sizes, rounds, and, for its own processes, measure."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(sizes, nargs="*", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def print_turn(turn: Turn) -> None:
    print(json.dumps(asdict(turn)))


def measure_pairs(loss: Callable[[Tensor, Tensor], Tensor], pairs: int, dim: int) -> None:
    """Measures a loss of two views on one thread, and prints the result."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loss(*views(512, dim)).backward()
    z1, z2 = views(pairs, dim)
    print_turn(measure(lambda: loss(z1, z2)))


def views(pairs: int, dim: int) -> tuple[Tensor, Tensor]:
    return torch.randn(pairs, dim, requires_grad=True), torch.randn(pairs, dim, requires_grad=True)


def take_turns(module: str, size: int, rounds: int, names: Sequence[str] = NAMES) -> dict[str, list[Turn]]:
    """Runs `python -m module size --measure name`, which prints one Turn, for each name in each round."""
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            command = [sys.executable, "-m", module, str(size), "--measure", name]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            turns[name].append(Turn(**json.loads(out)))
    losses = [turn.loss for name in names for turn in turns[name]]
    assert max(losses) - min(losses) < 1e-4, losses
    return turns


def quickest(turns: list[Turn]) -> float:
    return min(turn.seconds for turn in turns)


def largest(turns: list[Turn]) -> float:
    """The largest memory, in MiB."""
    return max(turn.bytes for turn in turns) / 2**20


def share(turns: list[Turn], operations: float) -> float:
    """The share of a turn's time that the operations take at the rate of matrix products; the median turn's."""
    return median(operations / turn.seconds / turn.gemm for turn in turns)


HEADER = "seconds: ours, plain, lightly | / ours | MiB: ours, plain, lightly | / ours | GEMM share"


def row(turns: dict[str, list[Turn]], operations: float) -> str:
    ours, plain, lightly = (quickest(turns[name]) for name in NAMES)
    our_mib, plain_mib, their_mib = (largest(turns[name]) for name in NAMES)
    return (
        f"{ours:.3f} {plain:.3f} {lightly:.3f} | {plain / ours:.1f}x {lightly / ours:.1f}x | "
        f"{our_mib:.0f} {plain_mib:.0f} {their_mib:.0f} | {plain_mib / our_mib:.0f}x {their_mib / our_mib:.0f}x | "
        f"{share(turns['ours'], operations):.0%}"
    )
