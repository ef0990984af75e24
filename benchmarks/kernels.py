"""Triton kernels on an accelerator: checked against fp64, and timed next to the device's own matrix products.

    python -m benchmarks.kernels                            # NT-Xent, CLIP, InfoNCE against a queue, augmentation
    KILOBATCH_KERNELS=all python -m benchmarks.kernels      # kernels for fp32 as well
    KILOBATCH_KERNELS=off python -m benchmarks.kernels      # torch's operations instead
    python -m benchmarks.kernels --device cpu --pairs 64    # a quick check of this script

Seconds are the median of rounds after warm-ups, by the device's clock; memory is that of a forward and backward at the
peak, without their inputs. NT-Xent's kernels need 6 M^2 D floating-point operations for M = 2 pairs rows, CLIP's 10 N^2
D for N pairs, a queue's 4 N K D; the share is of the rate of a product of 8192^3 in bf16, measured in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.augment import torch_ops
from kilobatch.data.augment.device import augment
from kilobatch.data.tensor_rng import keys
from kilobatch.data.views.options import Views
from kilobatch.methods.losses.contrastive import clip_loss, info_nce, nt_xent
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.options import Operands

DIM, TEMPERATURE, KEYS, ROUNDS = 128, 0.1, 65_536, 20
Loss = Callable[..., Tensor]  # nt_xent, or a loss with the same arguments


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    for _ in range(3):
        work()
    times = []
    for _ in range(ROUNDS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
    return statistics.median(times)


def memory(work: Callable[[], object], device: torch.device) -> float:
    """MiB at the peak, less what was allocated before."""
    if device.type != "cuda":
        return float("nan")
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def pairs_of(n: int, device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    z = torch.randn(n, DIM, device=device)
    return [(z + torch.randn(n, DIM, device=device)).requires_grad_() for _ in range(2)]


def step(loss: Loss, z: list[Tensor], operands: Operands) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(z[0], z[1], TEMPERATURE, operands=operands), z)


def gradient_error(loss: Loss, device: torch.device, operands: Operands) -> float:
    """The larger relative error of the two gradients, for 500 pairs, against fp64 by torch's operations."""
    z = pairs_of(500, device)
    exact = [x.detach().double().requires_grad_() for x in z]
    want = torch.autograd.grad(loss(exact[0], exact[1], TEMPERATURE), exact)
    got = torch.autograd.grad(loss(z[0], z[1], TEMPERATURE, operands=operands), z)
    return max(((g - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))


def time_pairs(what: str, loss: Loss, products: int, pairs: list[int], device: torch.device, gemm: float) -> None:
    """products: the number of floating-point operations, divided by pairs^2 DIM."""
    print(f"{what}, forward and backward: operands | error | pairs: ms, MiB, share of the matrix rate")
    for operands in get_args(Operands):
        cells = [f"{operands} | {gradient_error(loss, device, operands):.1e}"]
        for n in pairs:
            work = step(loss, pairs_of(n, device), operands)
            elapsed = seconds(work, device)
            share = products * n**2 * DIM / elapsed / gemm
            cells.append(f"{n}: {1e3 * elapsed:.3f} {memory(work, device):.0f} {share:.0%}")
        print(" | ".join(cells), flush=True)


def time_queue(device: torch.device, gemm: float) -> None:
    print(f"InfoNCE, {KEYS} keys: operands | queries: ms, share of the matrix rate")
    queue = Queue(QueueOptions(length=KEYS, dtype="bf16"), DIM).to(device)
    for operands in get_args(Operands):
        cells: list[str] = [operands]
        for n in (256, 4096) if device.type == "cuda" else (16,):
            q, k = (F.normalize(x.detach(), dim=1) for x in pairs_of(n, device))
            q.requires_grad_()

            def work(q: Tensor = q, k: Tensor = k, operands: Operands = operands) -> object:
                return torch.autograd.grad(info_nce(q, k, queue, TEMPERATURE, operands=operands), q)

            elapsed = seconds(work, device)
            cells.append(f"{n}: {1e3 * elapsed:.3f} {4 * n * KEYS * DIM / elapsed / gemm:.0%}")
        print(" | ".join(cells), flush=True)


def time_augmentation(images: int, size: int, device: torch.device) -> None:
    views = Views(size=size)
    pixels = torch.randint(256, (images, 2, size, size, 3), dtype=torch.uint8, device=device).permute(0, 1, 4, 2, 3)
    view_keys = keys(0, 0, torch.arange(images), 2)
    forms: dict[str, Callable[[], Tensor]] = {
        "torch, fp32": lambda: torch_ops.augment_by_torch(pixels, view_keys, views),
        "kilobatch, fp32": lambda: augment(pixels, view_keys, views),
        "kilobatch, bf16": lambda: augment(pixels, view_keys, views, torch.bfloat16),
    }
    difference = (forms["kilobatch, fp32"]() - forms["torch, fp32"]()).abs().max().item() * 255 * max(views.std)
    what = f"SimCLR's colours and blur, two views of {size} pixels"
    print(f"{what}: {difference:.1e} of 255 apart at most; views per second")
    for name, form in forms.items():
        print(f"{name}: {2 * images / seconds(form, device):,.0f}, {memory(form, device):.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pairs", type=int, nargs="+", default=[4096, 16_384, 65_536])
    options = parser.parse_args()
    device = torch.device(options.device)
    side = 8192 if device.type == "cuda" else 512
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    gemm = 2 * side**3 / seconds(lambda: a @ a, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: {gemm / 1e12:.3g} TFLOP/s in bf16", flush=True)
    time_pairs("NT-Xent", nt_xent, 24, options.pairs, device, gemm)
    time_pairs("CLIP's loss", clip_loss, 10, options.pairs, device, gemm)
    time_queue(device, gemm)
    time_augmentation(*((256, 224) if device.type == "cuda" else (4, 32)), device)


if __name__ == "__main__":
    main()
