"""NT-Xent, forward and backward on one CPU thread: time and peak memory of ours, of a plain version, of lightly's.

    python benchmarks/nt_xent.py                  # 1024, 2048, 4096 and 8192 pairs, 128 dimensions; about 3 minutes
    python benchmarks/nt_xent.py 4096 --rounds 7

Each measurement is a process of its own; the three take turns, and the best round counts. Seconds are those of the CPU
(one thread: the clock's, on an idle machine). Memory is what the kernel
saw resident at the peak (VmHWM, reset before the call) above what was resident before. GEMM share: floating-point
operations that our tiles need (4 M^2 D) per second, over those of a 2048^3 fp32 matrix product on the same thread.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

DIM, TEMPERATURE = 128, 0.1
NAMES = ("ours", "plain", "lightly")


def plain(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    n = len(z1)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    s = z @ z.T / temperature
    s = s.masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(s, torch.arange(2 * n).roll(n))


def loss_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "plain":
        return lambda z1, z2: plain(z1, z2, TEMPERATURE)
    if name == "lightly":
        from lightly.loss import NTXentLoss  # pyright: ignore[reportMissingImports]

        return NTXentLoss(temperature=TEMPERATURE)
    from methods.losses import nt_xent

    return lambda z1, z2: nt_xent(z1, z2, TEMPERATURE)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure(name: str, pairs: int) -> dict[str, float]:
    """seconds and bytes of one forward and backward, after a warm-up at 512 pairs; gemm: fp32 operations per second."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loss = loss_of(name)
    loss(torch.randn(512, DIM, requires_grad=True), torch.randn(512, DIM, requires_grad=True)).backward()
    z1, z2 = torch.randn(pairs, DIM, requires_grad=True), torch.randn(pairs, DIM, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    start = time.process_time()
    value = loss(z1, z2)
    value.backward()
    seconds = time.process_time() - start
    peak = resident("VmHWM") - before
    a, gemm = torch.randn(2048, 2048), 0.0
    for _ in range(3):
        start = time.process_time()
        torch.mm(a, a)
        gemm = max(gemm, 2 * 2048**3 / (time.process_time() - start))
    return {"seconds": seconds, "bytes": peak, "gemm": gemm, "loss": value.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.pairs[0])))
        return
    print("pairs | seconds: ours, plain, lightly | / ours | MiB: ours, plain, lightly | / ours | GEMM share")
    for pairs in options.pairs:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
        for _ in range(options.rounds):
            for name in NAMES:
                command = [sys.executable, __file__, str(pairs), "--measure", name]
                runs[name].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
        assert max(r["loss"] for k in NAMES for r in runs[k]) - min(r["loss"] for k in NAMES for r in runs[k]) < 1e-4
        seconds = [min(run["seconds"] for run in runs[name]) for name in NAMES]
        mib = [max(run["bytes"] for run in runs[name]) / 2**20 for name in NAMES]
        share = 4 * (2 * pairs) ** 2 * DIM / seconds[0] / max(run["gemm"] for name in NAMES for run in runs[name])
        print(
            f"{pairs:5} | {seconds[0]:.3f} {seconds[1]:.3f} {seconds[2]:.3f} | "
            f"{seconds[1] / seconds[0]:.1f}x {seconds[2] / seconds[0]:.1f}x | {mib[0]:.0f} {mib[1]:.0f} {mib[2]:.0f} | "
            f"{mib[1] / mib[0]:.0f}x {mib[2] / mib[0]:.0f}x | {share:.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
