"""Measures NT-Xent, forward and backward, with the machine's matrix products as its limit."""

import torch

from kilobatch.methods.losses.contrastive import nt_xent
from kilobatch.trainer.bench.rates import BenchRow, best, gemm

DIM, TEMPERATURE = 128, 0.1
PAIRS = {"cpu": (512, 1024, 2048), "cuda": (4096, 16384, 65536)}


def rows(device: torch.device) -> list[BenchRow]:
    """One row for each number of pairs.

    Where one rank has all M rows, tiles of half the matrix need 4 M^2 D floating-point operations: M^2 D for the
    similarities, M^2 D to compute them again in the backward, and 2 M^2 D for the gradients of their two sides.
    """
    limits, rates = [gemm(device)], []
    for pairs in PAIRS[device.type]:
        z1, z2 = (torch.randn(pairs, DIM, device=device, requires_grad=True) for _ in range(2))
        seconds = best(lambda z1=z1, z2=z2: nt_xent(z1, z2, TEMPERATURE).backward(), device)
        operations = 4 * (2 * pairs) ** 2 * DIM
        limits.append(gemm(device))  # again for each, because other work on the machine comes and goes
        rates.append((f"NT-Xent, {pairs} pairs", operations / seconds))
    return [BenchRow(what, rate, max(limits), "FLOP", "matrix product, fp32") for what, rate in rates]
