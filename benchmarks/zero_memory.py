"""Memory of the encoder of 795 M parameters (ResNet-152, three times as wide, selective kernels) under ZeRO.

    python -m benchmarks.zero_memory                   # a table by rank and part, computed from numbers of elements
    python -m benchmarks.zero_memory --check           # the formula against two ranks' resident memory; two minutes
    python -m benchmarks.zero_memory --step largest    # a step of the encoder, ZeRO 1, two ranks; some 21 GiB
    python -m benchmarks.zero_memory --step r101_2x    # of ResNet-101, twice as wide; 7 GiB

--check trains a perceptron of 49 M parameters, which has hardly any activations. --step is SimCLR with LARS, two images
of 64 pixels a rank, and a narrow projection head.
"""

import argparse
import os
from pathlib import Path
from time import perf_counter
from typing import Any

# Freed tensors go back to the kernel at once, so that resident memory is what is in use.
os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}

import torch
from torch import Tensor, nn

from benchmarks.turns import resident
from kilobatch.data.batch import Batch, make_batch
from kilobatch.methods import collectives
from kilobatch.methods.losses.contrastive import nt_xent
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.heads import ProjectionHead
from kilobatch.methods.networks.resnet import resnet
from kilobatch.trainer.costs.zero_memory import zero_memory
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.optim.optimizers import build_optimizer
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.optim.parameter_groups import parameter_groups
from kilobatch.trainer.options import EngineOptions
from kilobatch.trainer.ranks.spawn import run_ranks
from kilobatch.trainer.step import check_finite, forward_backward

GIB = 1 << 30
DIM, VIEWS, QUEUE, GLOBAL_BATCH = 128, 2, 65_536, 4096
SIDE, SAMPLES = 64, 2  # of --step


class SimCLR(Method):
    """Any encoder, and a projection head of SimCLRv2's three layers."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def embed(self, batch: Batch) -> Tensors:
        views = batch.views[0]
        return {"z": self.head(self.encoder(views.flatten(0, 1))).unflatten(0, views.shape[:2])}

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        a, b = z["z"].unbind(1)
        return nt_xent(a, b, 0.1)


def largest(hidden: int = 6144) -> SimCLR:
    return SimCLR(resnet(152, 3, 0.0625), ProjectionHead(6144, hidden, DIM, "global", 3))


def perceptron() -> SimCLR:
    """48 M parameters and hardly any activations."""
    layers = [nn.Linear(192, 4000), *[nn.Linear(4000, 4000) for _ in range(3)]]
    return SimCLR(nn.Sequential(nn.Flatten(), *layers), nn.Linear(4000, DIM))


def sizes(method: nn.Module) -> list[int]:
    return [sum(p.numel() for p in group["params"]) for group in parameter_groups(method, OptimizerOptions())]


def table() -> None:
    with torch.device("meta"):
        method = largest()
    groups = sizes(method)
    buffers = sum(b.nbytes for b in method.buffers())
    encoder = sum(p.numel() for p in method.encoder.parameters())
    print(f"encoder {encoder / 1e6:.2f} M, with its head {sum(groups) / 1e6:.2f} M parameters; fp32, LARS; GiB a rank")
    print(f"the same at every stage: BatchNorm's buffers {buffers / GIB:.3f}; activations are not counted here")
    head = "| ranks | ZeRO | parameters | masters | momentum | gradients | averaging or updating, beside | most |"
    print(head + " embeddings of a batch of 4096 | queue of 65,536, sharded |")
    print("|---" * 10 + "|")
    for ranks in (1, 8, 64):
        for zero in (0, 1, 2):
            m = zero_memory(groups, zero, ranks)
            rows = GLOBAL_BATCH * VIEWS  # those gathered of all ranks, and this rank's own with their gradient
            embeddings = 4 * DIM * (rows + 2 * rows // ranks)
            temporary = max(m.averaging, m.updating)
            cells = [
                m.parameters,
                m.masters,
                m.moments,
                m.gradients,
                temporary,
                m.peak,
                embeddings,
                4 * DIM * QUEUE // ranks,
            ]
            print(f"| {ranks} | {zero} | " + " | ".join(f"{cell / GIB:.3f}" for cell in cells) + " |")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def batch(step: int, samples: int, side: int) -> Batch:
    seed = torch.Generator().manual_seed(step * collectives.world_size() + collectives.rank())
    index = torch.arange(samples)
    return make_batch(torch.randn(samples, VIEWS, 3, side, side, generator=seed), index, index)


def engine_of(method: Method, name: str, zero: int, chunks: int, samples: int) -> Engine:
    optimizer = build_optimizer(OptimizerOptions(name=name, lr=0.1), method, 256)  # pyright: ignore[reportArgumentType]
    options = EngineOptions(zero=zero, chunks=chunks, keep=0)  # pyright: ignore[reportArgumentType]
    return Engine(method, optimizer, options, torch.device("cpu"), samples)


def measured(name: str, zero: int, chunks: int) -> dict[str, float]:
    """Resident bytes of this rank at four moments of a step, less those of the process without the method."""
    tiny = engine_of(
        SimCLR(nn.Flatten(), nn.Linear(192, DIM)), name, zero, chunks, 2
    )  # for the memory that imports take
    for step in range(2):
        forward_backward(tiny, batch(step, 2, 8))
        tiny.step(0.1)
    empty = resident("VmRSS")
    torch.manual_seed(0)
    engine = engine_of(perceptron(), name, zero, chunks, 2)
    sizes: dict[str, float] = {}
    for step in range(2):
        sizes["standing"] = resident("VmRSS") - empty
        reset_peak()
        outcome = forward_backward(engine, batch(step, 2, 8))
        sizes["backward"] = resident("VmHWM") - empty
        sizes["gradients"] = resident("VmRSS") - empty
        check_finite(engine, outcome, step)
        reset_peak()
        engine.step(0.1)
        sizes["step"] = resident("VmHWM") - empty
    return sizes


CASES = [(name, zero, 1) for name in ("lars", "adamw") for zero in (0, 1, 2)] + [("lars", 1, 2), ("lars", 2, 2)]


def check() -> None:
    groups = sizes(perceptron())
    print(f"{sum(groups) / 1e6:.1f} M parameters, two ranks, MB of one: resident (by the formula)")
    for name, zero, chunks in CASES:
        ranks = run_ranks(2, measured, name, zero, chunks, timeout=300)
        m = zero_memory(groups, zero, 2, moments=2 if name == "adamw" else 1, chunks=chunks)
        in_backward = m.averaging if zero == 2 else 0
        expected = {
            "standing": m.standing,
            "backward": m.standing + m.gradients + in_backward,
            "gradients": m.standing + m.gradients,
            "step": m.standing + m.gradients + max(m.updating, 0 if zero == 2 else m.averaging),
        }
        row = [f"{key} {ranks[0][key] / 1e6:.0f} ({bytes / 1e6:.0f})" for key, bytes in expected.items()]
        print(f"{name} ZeRO {zero} chunks {chunks}: " + "; ".join(row), flush=True)


def one_step(encoder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    empty = resident("VmRSS")
    narrow = 512  # width of the head's hidden layer, as both ranks share the memory of this machine
    small = encoder == "r101_2x"
    method = SimCLR(resnet(101, 2), ProjectionHead(4096, narrow, DIM, "global", 3)) if small else largest(narrow)
    engine = engine_of(method, "lars", 1, 1, SAMPLES)
    losses, seconds = [], []
    for step in range(2):
        start = perf_counter()
        outcome = forward_backward(engine, batch(step, SAMPLES, SIDE))
        check_finite(engine, outcome, step)
        engine.step(0.1)
        seconds.append(perf_counter() - start)
        losses.append(outcome.loss.item())
    return {"empty": empty, "peak": resident("VmHWM"), "losses": losses, "seconds": seconds, "groups": sizes(method)}


def step(encoder: str) -> None:
    ranks = run_ranks(2, one_step, encoder, timeout=3600)
    m = zero_memory(ranks[0]["groups"], 1, 2)
    count = sum(ranks[0]["groups"]) / 1e6
    print(f"{count:.2f} M parameters; ZeRO 1, two ranks, LARS, batch {SAMPLES} a rank, {SIDE} pixels")
    print(f"by the formula, without activations: {m.peak / GIB:.2f} GiB a rank")
    for number, rank in enumerate(ranks):
        losses, seconds = ([f"{x:.4f}" for x in rank["losses"]], [f"{x:.0f} s" for x in rank["seconds"]])
        print(
            f"rank {number}: peak resident {rank['peak'] / GIB:.2f} GiB (the empty process {rank['empty'] / GIB:.2f}); "
            f"losses {', '.join(losses)}; steps {', '.join(seconds)}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--step", choices=["largest", "r101_2x"])
    options = parser.parse_args()
    if options.check:
        check()
    elif options.step:
        step(options.step)
    else:
        table()
