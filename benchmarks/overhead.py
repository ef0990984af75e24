"""What the trainer adds to a step: its loop against a bare one, on one CPU thread.

    python -m benchmarks.overhead                   # about five minutes
    python -m benchmarks.overhead --rounds 12 --batch 64

The loop: Loop as `kilobatch train` wires it, on digits: FFCV loader in a thread of its own, DeepSpeed engine, check of
what is not finite, monitor (metrics.jsonl, TensorBoard, measures every 3 steps), checkpoints as a recipe has them by
default (none is due here). The bare one: the same method, optimizer and batches, ready in memory; embed, loss,
backward, optimizer.step, running statistics, update. They take turns, an epoch each, with memory kept as workers do.

CPU: seconds of the main thread, in which both compute everything but the loader's views; the clock's, on an idle
machine with two processors.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from rich.console import Console

from data.batch import Batch
from data.convert import prepare
from data.loader import Loader
from launch import recipe
from launch.recipe import Recipe
from launch.workers import KEEP_MEMORY
from methods import norm
from methods.convnet import ConvNet
from methods.method import Method
from methods.simclr import SimCLR
from trainer import optimizers
from trainer.checkpoint import Checkpoints
from trainer.engine import Engine
from trainer.loop import Loop
from trainer.monitor import Monitor


class Clock:
    """Seconds since the last look: of the main thread's CPU, and of the clock."""

    def __init__(self) -> None:
        self.look()

    def look(self) -> tuple[float, float]:
        now = time.thread_time(), time.perf_counter()
        before, self._last = getattr(self, "_last", now), now
        return now[0] - before[0], now[1] - before[1]


class Bare:
    """The same step in plain torch, on batches that are ready."""

    def __init__(self, method: Method, chosen: Recipe, batches: list[Batch]) -> None:
        self.method, self.batches = method, batches
        self.optimizer = optimizers.build(chosen.optimizer, method, chosen.data.batch)

    def epoch(self) -> None:
        for batch in self.batches:
            z = self.method.embed(batch.views)
            t = self.method.target(batch.views)
            loss = self.method.loss(z, t, batch)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            norm.commit(self.method)
            self.method.update({k: x.detach() for k, x in z.items()}, t, batch, 0.5)


def simclr(width: int) -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(ConvNet(width, "global"), temperature=0.2)


def rounds(folder: Path, chosen: Recipe, width: int, count: int) -> list[list[float]]:
    """Per round: CPU seconds of an epoch in the loop and in the bare one, and the clock's of both."""
    device, batch = torch.device("cpu"), chosen.data.batch
    beton = prepare("digits", "train")
    found: list[list[float]] = []
    loader = Loader(beton, chosen.data.views, batch=batch, rank=0, world=1, seed=0, threads=1, device=device)
    with loader, Checkpoints(folder / "checkpoints", chosen.checkpoint, 0, 1) as checkpoints:
        bare = Bare(simclr(width), chosen, list(loader.epoch(0)))
        method = simclr(width)
        optimizer = optimizers.build(chosen.optimizer, method, batch)
        clock = Clock()

        def turn(epoch: int) -> dict[str, float]:
            cpu, wall = clock.look()
            bare.epoch()
            bare_cpu, bare_wall = clock.look()
            found.append([cpu, bare_cpu, wall, bare_wall])
            return {}

        loop = Loop(
            engine=Engine(method, optimizer, chosen.engine, device, batch),
            loader=loader,
            views=chosen.data.views,
            checkpoints=checkpoints,
            epochs=count + 1,
            learning_rate=lambda step: 0.003,
            evaluate=turn,
            asked_to_stop=lambda: False,
            monitor=None,
            log_every=chosen.run.log_every,
            recipe={},
            images=1437,
            classes=10,
            data_sha256="",
        )
        with (folder / "console").open("w") as file:
            loop.monitor = Monitor(folder, loop.steps, 0, loop.epochs, Console(file=file))
            clock.look()
            loop.run(0)
            loop.monitor.close()
    return found[1:]  # the first round is for what is made on first use


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=478, help="images of a step, two views of each")
    parser.add_argument("--width", type=int, default=16, help="of the encoder; the demo's is 16")
    asked = parser.parse_args()
    if not KEEP_MEMORY.items() <= os.environ.items():  # the C library reads it at the start
        command = [sys.executable, "-m", "benchmarks.overhead", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=os.environ | KEEP_MEMORY).returncode)
    torch.set_num_threads(1)
    chosen = recipe.resolve("demo", [f"data.batch={asked.batch}", "checkpoint.every_minutes=10"])
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        found = rounds(Path(folder), chosen, asked.width, asked.rounds)
        dist.destroy_process_group()
    cpu, bare_cpu, wall, bare_wall = zip(*found, strict=True)
    steps = 1437 // asked.batch
    for name, ours, bare in (("CPU", cpu, bare_cpu), ("clock", wall, bare_wall)):
        ratios = [a / b - 1 for a, b in zip(ours, bare, strict=True)]
        print(
            f"{name}: a step takes {median(ours) / steps * 1e3:.1f} ms in the loop, "
            f"{median(bare) / steps * 1e3:.1f} bare; overhead {median(ratios):+.1%} (median of {len(found)} rounds; "
            f"best against best {min(ours) / min(bare) - 1:+.1%})"
        )


if __name__ == "__main__":
    main()
