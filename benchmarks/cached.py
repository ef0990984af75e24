"""Cached gradients on one CPU thread: their time against one pass, and their peak memory against the batch size.

    python -m benchmarks.cached            # some minutes; writes docs/cached.md and docs/cached.png
    python -m benchmarks.cached --rounds 7

Time: forward_backward of SimCLR with a local norm, CPU seconds; one pass over the batch, the batch in 8 chunks, and
in 8 chunks of which half keep their graph, in turns in one process; the best round counts. Memory: what the kernel saw
resident at the peak (VmHWM, reset before) above what was resident before, in a process for each point.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.turns import resident
from kilobatch.data.batch import Batch
from kilobatch.methods.networks import batch_norm as norm
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.resnet import ResNet
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer.parity import PlainEngine
from kilobatch.trainer.step import forward_backward

SIDE, CHUNKS, CHUNK = 32, 8, 64
TIMED = {"six convolutions, 512 images": ("convnet", 512), "ResNet-18, 64 images": ("resnet18", 64)}
BATCHES = (64, 128, 256, 512, 1024)
KINDS = ("one pass", f"chunks of {CHUNK}", f"chunks of {CHUNK}, 4 kept")
DOCS = Path(__file__).parents[1] / "docs"


def method(encoder: str) -> SimCLR:
    torch.manual_seed(0)
    network: Encoder = ConvNet(16, "local") if encoder == "convnet" else ResNet("resnet18", "cifar", "local")
    return SimCLR(network, temperature=0.2)


def batch(images: int) -> Batch:
    return Batch(torch.randn(images, 2, 3, SIDE, SIDE), torch.arange(images), torch.zeros(images, dtype=torch.int64))


def step(of: SimCLR, images: Batch, chunks: int, keep: int) -> None:
    forward_backward(PlainEngine(of, len(images), chunks=chunks, keep=keep), images)
    norm.commit(of)
    for p in of.parameters():
        p.grad = None


def seconds(encoder: str, images: int, rounds: int) -> list[float]:
    """Of one pass; of CHUNKS chunks; of CHUNKS chunks, half of them kept."""
    of, data = method(encoder), batch(images)
    best = [float("inf")] * 3
    for _ in range(rounds + 1):  # the first round is for what is made on first use
        for i, (chunks, keep) in enumerate(((1, 0), (CHUNKS, 0), (CHUNKS, CHUNKS // 2))):
            start = time.process_time()
            step(of, data, chunks, keep)
            best[i] = min(best[i], time.process_time() - start)
    return best


def mib(kind: str, images: int) -> float:
    """Of one step, after a small one."""
    of, data = method("convnet"), batch(images)
    step(of, batch(8), 1, 0)
    chunks = 1 if kind == KINDS[0] else images // CHUNK
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(of, data, chunks, min(4, chunks) if kind == KINDS[2] else 0)
    return (resident("VmHWM") - before) / 2**20


def plot(found: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    for (kind, values), style in zip(found.items(), ("o-", "s-", "^--"), strict=True):
        axes.plot(BATCHES, values, style, label=kind)
    axes.set(xscale="log", xlabel="images in the batch", ylabel="MiB at the peak of a step", ylim=(0, None))
    axes.set_xticks(BATCHES, [str(n) for n in BATCHES], minor=False)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--memory", nargs=2, metavar=("KIND", "IMAGES"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.memory:
        print(json.dumps(mib(asked.memory[0], int(asked.memory[1]))))
        return
    times = {name: seconds(*of, asked.rounds) for name, of in TIMED.items()}
    print(times, flush=True)
    # Blocks given back at once, so that what is resident is what is in use.
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found: dict[str, list[float]] = {}
    for kind in KINDS:
        commands = [[sys.executable, "-m", "benchmarks.cached", "--memory", kind, str(n)] for n in BATCHES]
        told = [subprocess.run(c, check=True, stdout=subprocess.PIPE, env=exact).stdout for c in commands]
        found[kind] = [json.loads(line) for line in told]
        print(kind, found[kind], flush=True)
    plot(found, DOCS / "cached.png")
    text = f"""# Cached gradients, measured

By `python -m benchmarks.cached`, which says how: SimCLR, two views of {SIDE} pixels, one CPU thread.

Time of a step's gradients, best of {asked.rounds} rounds. By counting, a second forward adds a third to a backward that
costs two forwards: 1.33x with nothing kept, 1.17x with half.

{
        table(
            ("encoder, batch", "one pass", f"{CHUNKS} chunks", f"{CHUNKS} chunks, half kept"),
            [(name, f"{a:.2f} s", f"{b / a:.2f}x", f"{c / a:.2f}x") for name, (a, b, c) in times.items()],
        )
    }

Memory at the peak of a step, six convolutions of width 16, MiB above what was resident before:

{
        table(
            ("images in the batch", *map(str, BATCHES)),
            [(k, *(f"{v:.0f}" for v in values)) for k, values in found.items()],
        )
    }

![Peak memory against the batch size](cached.png)
"""
    (DOCS / "cached.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
