"""What the trainer adds to a step: its loop against a bare one, on one CPU thread.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --batch 128 --processes 8

The loop: Loop as `kilobatch train` wires it, on digits: FFCV loader in a thread of its own, DeepSpeed engine, check of
what is not finite, monitor (metrics.jsonl, TensorBoard, measures every 3 steps), checkpoints as a recipe has them by
default (none is due here). The bare one: the same method, optimizer and batches, ready in memory; embed, loss,
backward, optimizer.step, running statistics, update; with memory kept as workers do.

Every batch goes through both, one after the other, and the next one the other way round: what else the machine does
meets both. In every second epoch the loader has made all batches beforehand, so that its thread rests during the steps:
what is left is the trainer's own. A process's overhead is the mean of the loop's seconds over that of the bare one's,
without the tenth of its pairs that differ most either way. Where two networks come to lie in memory makes one of them
faster than the other by 1 or 2 % as long as the process lives: so there are several, and the spread is that over them.

CPU: seconds of the main thread, in which both compute everything but the loader's views; the clock's, on an idle
machine with two processors.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.loading.loader import Loader
from kilobatch.data.sources.convert import prepare
from kilobatch.launch.processes.worker_processes import KEEP_MEMORY
from kilobatch.launch.recipes import recipe
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.methods.method import Method
from kilobatch.methods.networks import batch_norm as norm
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.loop import Loop
from kilobatch.trainer.monitor.monitor import Monitor
from kilobatch.trainer.optim import optimizers

IMAGES = 1437  # digits to train on


class Bare:
    """The same step in plain torch, on batches that are ready."""

    def __init__(self, method: Method, chosen: Recipe) -> None:
        self.method = method
        self.optimizer = optimizers.build(chosen.optimizer, method, chosen.data.batch)

    def step(self, batch: Batch) -> None:
        z = self.method.embed(batch.views)
        t = self.method.target(batch.views)
        loss = self.method.loss(z, t, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        norm.commit(self.method)
        self.method.update({k: x.detach() for k, x in z.items()}, t, batch, 0.5)


class Turns(Loader):
    """The loader, from which the loop takes its batches: each goes through the bare step as well.

    pairs: for each step whether the loader's thread rested, then seconds: of the main thread's CPU in the loop and in
    the bare step, of the clock in both.
    """

    bare: Bare
    pairs: list[tuple[bool, float, float, float, float]]

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        batches, rests = super().epoch(epoch, first_step), epoch % 2 == 1
        if rests:
            batches = iter(list(batches))
            time.sleep(1)  # for the batches that it makes ahead
        for _ in range(first_step, self.steps_per_epoch):
            cpu, wall = time.thread_time(), time.perf_counter()
            batch = next(batches)
            waited = time.thread_time() - cpu, time.perf_counter() - wall
            bare = self.timed(batch) if len(self.pairs) % 2 else None
            cpu, wall = time.thread_time(), time.perf_counter()
            yield batch
            loop = waited[0] + time.thread_time() - cpu, waited[1] + time.perf_counter() - wall
            bare = bare or self.timed(batch)
            self.pairs.append((rests, loop[0], bare[0], loop[1], bare[1]))

    def timed(self, batch: Batch) -> tuple[float, float]:
        cpu, wall = time.thread_time(), time.perf_counter()
        self.bare.step(batch)
        return time.thread_time() - cpu, time.perf_counter() - wall


def simclr(width: int) -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(ConvNet(width, "global"), temperature=0.2)


def pairs(folder: Path, chosen: Recipe, width: int, epochs: int) -> Tensor:
    """(steps, 5) fp64: Turns.pairs, without the first two epochs, which are for what is made on first use."""
    device, batch = torch.device("cpu"), chosen.data.batch
    beton = prepare("digits", "train")
    loader = Turns(beton, chosen.data.views, batch=batch, rank=0, world=1, seed=0, threads=1, device=device)
    loader.bare, loader.pairs = Bare(simclr(width), chosen), []
    with loader, Checkpoints(folder / "checkpoints", chosen.checkpoint, 0, 1) as checkpoints:
        method = simclr(width)
        optimizer = optimizers.build(chosen.optimizer, method, batch)
        loop = Loop(
            engine=Engine(method, optimizer, chosen.engine, device, batch),
            loader=loader,
            views=chosen.data.views,
            checkpoints=checkpoints,
            epochs=epochs + 2,
            learning_rate=lambda step: 0.003,
            evaluate=lambda epoch: {},
            asked_to_stop=lambda: False,
            monitor=None,
            log_every=chosen.run.log_every,
            recipe={},
            images=IMAGES,
            classes=10,
            data_sha256="",
        )
        with (folder / "console").open("w") as file:
            loop.monitor = Monitor(folder, loop.steps, 0, loop.epochs, Console(file=file))
            loop.run(0)
            loop.monitor.close()
    return torch.tensor(loader.pairs[2 * loader.steps_per_epoch :], dtype=torch.float64)


def trimmed(ours: Tensor, bare: Tensor) -> list[float]:
    """ours, bare: (steps,) seconds of the same steps -> their means, without the pairs that differ most."""
    order = (ours - bare).argsort()
    kept = order[len(order) // 10 : len(order) - len(order) // 10]
    return [ours[kept].mean().item(), bare[kept].mean().item()]


def one_process(chosen: Recipe, width: int, epochs: int) -> None:
    """Tells CPU and clock, first with the loader at work and then at rest: [[ours, bare], ...] in JSON."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        found = pairs(Path(folder), chosen, width, epochs)
        dist.destroy_process_group()
    columns = [found[found[:, 0] == rests].unbind(1) for rests in (0, 1)]
    print(json.dumps([trimmed(c[at], c[at + 1]) for c in columns for at in (1, 3)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6, help="in each process")
    parser.add_argument("--batch", type=int, default=478, help="images of a step, two views of each")
    parser.add_argument("--width", type=int, default=16, help="of the encoder; the demo's is 16")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        chosen = recipe.resolve("demo", [f"data.batch={asked.batch}", "checkpoint.every_minutes=10"])
        return one_process(chosen, asked.width, asked.epochs)
    command = [sys.executable, "-m", "benchmarks.overhead", "--one", *sys.argv[1:]]
    found: list[list[list[float]]] = []
    for _ in range(asked.processes):  # the C library reads at its start how to keep memory
        out = subprocess.run(command, env=os.environ | KEEP_MEMORY, check=True, stdout=subprocess.PIPE).stdout
        found.append(json.loads(out.splitlines()[-1]))
    # (processes, 4, 2) seconds
    ours, bare = torch.tensor(found, dtype=torch.float64).unbind(2)
    ratios, n = ours / bare - 1, asked.processes
    for at, what in enumerate(("at work, CPU", "at work, clock", "at rest, CPU", "at rest, clock")):
        spread = ratios[:, at].std().item() / n**0.5 if n > 1 else float("nan")
        print(
            f"the loader {what + ':':15} {ours[:, at].mean() * 1e3:.1f} ms a step in the loop, "
            f"{bare[:, at].mean() * 1e3:.1f} bare: {ratios[:, at].mean():+.2%} ± {spread:.2%} ({n} processes)"
        )
    return None


if __name__ == "__main__":
    main()
