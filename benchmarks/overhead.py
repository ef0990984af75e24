"""Overhead of the training loop: a step of Loop compared with a plain step, on one CPU thread.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --batch 128 --processes 8

Loop is set up as by `kilobatch train`, on digits: FFCV loader in a thread of its own, DeepSpeed engine, check for NaN
and infinity, monitor (metrics.jsonl, TensorBoard, measures every 3 steps), checkpoints as a recipe has them by default
(none is due here). The plain step has the same method, optimizer and batches, which are ready in memory: embed, loss,
backward, optimizer.step, running statistics, update. It has the workers' settings of the memory allocator.

Every batch goes through both, one after the other, and in the other order for the next batch, so that other work on the
machine affects both. In every second epoch the loader has made all batches before the first step, so that its thread
rests during the steps and only the trainer's own overhead is left. The overhead of a process is the mean of the loop's
seconds over that of the plain step's, without the tenth of its pairs that differ most in each direction. Depending on
where its data lie in memory, one of two networks is faster by 1 or 2 % as long as the process lives. So there are
several processes, and the spread is that over them.

CPU seconds are those of the main thread, in which both compute everything but the loader's views. Clock seconds are
meant for an idle machine with two processors.
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
from kilobatch.data.loading.loader import Loader, LoaderWorker
from kilobatch.data.sources.convert import prepare
from kilobatch.launch.processes.worker_processes import KEEP_MEMORY
from kilobatch.launch.recipes.recipe import Recipe, resolve_recipe
from kilobatch.methods.method import Method
from kilobatch.methods.networks import batch_norm
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.loop import Loop
from kilobatch.trainer.monitor.monitor import Monitor
from kilobatch.trainer.optim import optimizers
from kilobatch.trainer.optim.schedules import StepRates

IMAGES = 1437  # digits to train on


class PlainStep:
    """The same step in plain torch, on batches that are ready in memory."""

    def __init__(self, method: Method, recipe: Recipe) -> None:
        self.method = method
        self.optimizer = optimizers.build_optimizer(recipe.optimizer, method, recipe.data.batch)

    def step(self, batch: Batch) -> None:
        z = self.method.embed(batch)
        t = self.method.target(batch)
        loss = self.method.loss(z, t, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        batch_norm.commit(self.method)
        self.method.update({k: x.detach() for k, x in z.items()}, t, batch)


class ComparingLoader(Loader):
    """A loader that gives each batch to the loop and also runs the plain step on it, and times both.

    pairs: for each step whether the loader's thread rested, then the main thread's CPU seconds in the loop and in the
    plain step, then clock seconds in both.
    """

    plain: PlainStep
    pairs: list[tuple[bool, float, float, float, float]]

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        batches, rests = super().epoch(epoch, first_step), epoch % 2 == 1
        if rests:
            batches = iter(list(batches))
            time.sleep(1)  # until the batches that it makes ahead are made
        for _ in range(first_step, self.steps_per_epoch):
            cpu, wall = time.thread_time(), time.perf_counter()
            batch = next(batches)
            waited = time.thread_time() - cpu, time.perf_counter() - wall
            plain = self.timed(batch) if len(self.pairs) % 2 else None
            cpu, wall = time.thread_time(), time.perf_counter()
            yield batch
            loop = waited[0] + time.thread_time() - cpu, waited[1] + time.perf_counter() - wall
            plain = plain or self.timed(batch)
            self.pairs.append((rests, loop[0], plain[0], loop[1], plain[1]))

    def timed(self, batch: Batch) -> tuple[float, float]:
        cpu, wall = time.thread_time(), time.perf_counter()
        self.plain.step(batch)
        return time.thread_time() - cpu, time.perf_counter() - wall


def simclr(width: int) -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(ConvNet(width, "global"), temperature=0.2)


def pairs(folder: Path, recipe: Recipe, width: int, epochs: int) -> Tensor:
    """(steps, 5) fp64: ComparingLoader.pairs without the first two epochs, which include what is done only once."""
    device, batch = torch.device("cpu"), recipe.data.batch
    beton = prepare("digits", "train")
    worker = LoaderWorker(rank=0, world=1, threads=1, device=device)
    loader = ComparingLoader(beton, recipe.data.groups[0], worker, batch=batch, seed=0)
    loader.plain, loader.pairs = PlainStep(simclr(width), recipe), []
    with loader, Checkpoints(folder / "checkpoints", recipe.checkpoint, 0, 1) as checkpoints:
        method = simclr(width)
        optimizer = optimizers.build_optimizer(recipe.optimizer, method, batch)
        loop = Loop(
            engine=Engine(method, optimizer, recipe.engine.decided("fp32").options(), device, batch),
            loader=loader,
            views=recipe.data.groups[0],
            checkpoints=checkpoints,
            epochs=epochs + 2,
            rates=lambda step: StepRates(0.003),
            evaluate=lambda epoch: {},
            stop_requested=lambda: False,
            monitor=None,
            log_every=recipe.run.log_every,
            recipe={},
            images=IMAGES,
            classes=[],
            images_sha256="",
            data_sha256="",
        )
        with (folder / "console").open("w") as file:
            loop.monitor = Monitor(folder, loop.steps, 0, loop.epochs, Console(file=file))
            loop.run(0)
            loop.monitor.close()
    return torch.tensor(loader.pairs[2 * loader.steps_per_epoch :], dtype=torch.float64)


def trimmed_means(loop: Tensor, plain: Tensor) -> list[float]:
    """The means of loop and plain, (steps,) seconds of the same steps, without the pairs that differ most."""
    order = (loop - plain).argsort()
    kept = order[len(order) // 10 : len(order) - len(order) // 10]
    return [loop[kept].mean().item(), plain[kept].mean().item()]


def one_process(recipe: Recipe, width: int, epochs: int) -> None:
    """Prints [[loop, plain], ...] in JSON: CPU and clock seconds, first with the loader at work and then at rest."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        rows = pairs(Path(folder), recipe, width, epochs)
        dist.destroy_process_group()
    columns = [rows[rows[:, 0] == rests].unbind(1) for rests in (0, 1)]
    print(json.dumps([trimmed_means(c[at], c[at + 1]) for c in columns for at in (1, 3)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6, help="in each process")
    parser.add_argument("--batch", type=int, default=478, help="images of a step, two views of each")
    parser.add_argument("--width", type=int, default=16, help="of the encoder; the demo's is 16")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        recipe = resolve_recipe("demo", [f"data.batch={options.batch}", "checkpoint.every_minutes=10"])
        return one_process(recipe, options.width, options.epochs)
    command = [sys.executable, "-m", "benchmarks.overhead", "--one", *sys.argv[1:]]
    of_processes: list[list[list[float]]] = []
    for _ in range(options.processes):  # new ones, because the C library reads KEEP_MEMORY only when it starts
        out = subprocess.run(command, env=os.environ | KEEP_MEMORY, check=True, stdout=subprocess.PIPE).stdout
        of_processes.append(json.loads(out.splitlines()[-1]))
    # (processes, 4, 2) seconds
    loop, plain = torch.tensor(of_processes, dtype=torch.float64).unbind(2)
    ratios, n = loop / plain - 1, options.processes
    for at, what in enumerate(("at work, CPU", "at work, clock", "at rest, CPU", "at rest, clock")):
        spread = ratios[:, at].std().item() / n**0.5 if n > 1 else float("nan")
        print(
            f"the loader {what + ':':15} {loop[:, at].mean() * 1e3:.1f} ms a step in the loop, "
            f"{plain[:, at].mean() * 1e3:.1f} in the plain step: {ratios[:, at].mean():+.2%} ± {spread:.2%} "
            f"({n} processes)"
        )
    return None


if __name__ == "__main__":
    main()
