"""Cached gradients on one CPU thread: their time compared with one pass, and their peak memory by batch size.

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
from kilobatch.data.batch import Batch, make_batch
from kilobatch.methods.networks import batch_norm
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.resnet import ResNet
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer.plain_step import PlainEngine
from kilobatch.trainer.step import forward_backward

SIDE, CHUNKS, CHUNK = 32, 8, 64
ENCODERS = {"six convolutions, 512 images": ("convnet", 512), "ResNet-18, 64 images": ("resnet18", 64)}
BATCHES = (64, 128, 256, 512, 1024)
KINDS = ("one pass", f"chunks of {CHUNK}", f"chunks of {CHUNK}, 4 kept")
DOCS = Path(__file__).parents[1] / "docs"


def method(encoder: str) -> SimCLR:
    torch.manual_seed(0)
    network: Encoder = ConvNet(16, "local") if encoder == "convnet" else ResNet("resnet18", "cifar", "local")
    return SimCLR(network, temperature=0.2)


def batch(images: int) -> Batch:
    return make_batch(torch.randn(images, 2, 3, SIDE, SIDE))


def step(model: SimCLR, images: Batch, chunks: int, keep: int) -> None:
    forward_backward(PlainEngine(model, len(images), chunks=chunks, keep=keep), images)
    batch_norm.commit(model)
    for p in model.parameters():
        p.grad = None


def seconds(encoder: str, images: int, rounds: int) -> list[float]:
    """Seconds of one pass, of CHUNKS chunks, and of CHUNKS chunks of which half keep their graph."""
    model, data = method(encoder), batch(images)
    best = [float("inf")] * 3
    for _ in range(rounds + 1):  # the first round is for what is made on first use
        for i, (chunks, keep) in enumerate(((1, 0), (CHUNKS, 0), (CHUNKS, CHUNKS // 2))):
            start = time.process_time()
            step(model, data, chunks, keep)
            best[i] = min(best[i], time.process_time() - start)
    return best


def mib(kind: str, images: int) -> float:
    """MiB at the peak of one step, after a small one for what is allocated once."""
    model, data = method("convnet"), batch(images)
    step(model, batch(8), 1, 0)
    chunks = 1 if kind == KINDS[0] else images // CHUNK
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(model, data, chunks, min(4, chunks) if kind == KINDS[2] else 0)
    return (resident("VmHWM") - before) / 2**20


def plot(memory: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    for (kind, values), style in zip(memory.items(), ("o-", "s-", "^--"), strict=True):
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
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(mib(options.memory[0], int(options.memory[1]))))
        return
    times = {name: seconds(*setting, options.rounds) for name, setting in ENCODERS.items()}
    print(times, flush=True)
    # Freed blocks go back to the kernel at once, so that resident memory is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    memory: dict[str, list[float]] = {}
    for kind in KINDS:
        commands = [[sys.executable, "-m", "benchmarks.cached", "--memory", kind, str(n)] for n in BATCHES]
        lines = [subprocess.run(c, check=True, stdout=subprocess.PIPE, env=environment).stdout for c in commands]
        memory[kind] = [json.loads(line) for line in lines]
        print(kind, memory[kind], flush=True)
    plot(memory, DOCS / "cached.png")
    text = f"""# Cached gradients, measured

Written by `python -m benchmarks.cached`, whose docstring says how: SimCLR, two views of {SIDE} pixels, one CPU thread.

Time of a step's gradients, best of {options.rounds} rounds. What to expect: a backward costs about two forwards, so
computing each forward a second time adds a third: 1.33x where no chunk keeps its graph, and 1.17x where half of them
do.

{
        table(
            ("encoder, batch", "one pass", f"{CHUNKS} chunks", f"{CHUNKS} chunks, half kept"),
            [(name, f"{a:.2f} s", f"{b / a:.2f}x", f"{c / a:.2f}x") for name, (a, b, c) in times.items()],
        )
    }

Memory at the peak of a step, in MiB above what was resident before; six convolutions of width 16:

{
        table(
            ("images in the batch", *map(str, BATCHES)),
            [(k, *(f"{v:.0f}" for v in values)) for k, values in memory.items()],
        )
    }

![Peak memory against the batch size](cached.png)
"""
    (DOCS / "cached.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
