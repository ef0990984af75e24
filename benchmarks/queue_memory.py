"""Memory per rank of a queue of keys, sharded and replicated, on 1, 2, 4 and 8 ranks of this machine.

    python -m benchmarks.queue_memory                       # 262,144 keys of 128 dimensions; under a minute
    python -m benchmarks.queue_memory --length 1048576 --ranks 1 4

Every rank is a process. Memory is the resident memory at the peak (VmHWM, reset before) of building the queue and two
steps (a loss, its gradient and a push; 256 queries in all), less the resident memory before; the largest of the ranks
is shown. Sent: bytes that one rank sends in a step, computed by `bytes_sent` of methods/memories/options.py.
"""

import argparse
import gc
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.turns import resident
from kilobatch.methods import collectives
from kilobatch.methods.losses.contrastive import info_nce
from kilobatch.methods.memories.options import QueueOptions, bytes_held, bytes_sent
from kilobatch.methods.memories.queue import Queue
from kilobatch.trainer.ranks.spawn import run_ranks

QUERIES, TEMPERATURE = 256, 0.2
PLACEMENTS = ("sharded", "replicated")


def options(length: int, placement: str) -> QueueOptions:
    return QueueOptions.model_validate({"length": length, "placement": placement})


def step(queue: Queue, dim: int) -> None:
    q, k = F.normalize(torch.randn(2, QUERIES // collectives.world_size(), dim), dim=2)
    info_nce(q.requires_grad_(), k, queue, TEMPERATURE).backward()
    queue.push(k)


def measure(length: int, dim: int) -> list[float]:
    """MiB that this rank takes, by placement."""
    step(Queue(options(4096, "sharded"), dim), dim)  # torch and the ranks' connections allocate some memory once
    sizes = []
    for placement in PLACEMENTS:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        queue = Queue(options(length, placement), dim)
        for _ in range(2):
            step(queue, dim)
        sizes.append((resident("VmHWM") - before) / 2**20)
        del queue
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=262_144)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    print(f"{arguments.length} keys of {arguments.dim} dimensions, fp32; MiB per rank; KiB sent per rank and step")
    print("ranks | placement  | keys counted | measured | sent")
    for ranks in arguments.ranks:
        of_ranks = run_ranks(ranks, measure, arguments.length, arguments.dim, timeout=600)
        for placement, measured in zip(PLACEMENTS, zip(*of_ranks, strict=True), strict=True):
            queue = options(arguments.length, placement)
            counted = bytes_held(queue, arguments.dim, ranks) / 2**20
            kib = bytes_sent(queue, arguments.dim, ranks, QUERIES // ranks, TEMPERATURE) / 2**10
            print(f"{ranks:5} | {placement:10} | {counted:12.1f} | {max(measured):8.1f} | {kib:4.0f}", flush=True)


if __name__ == "__main__":
    main()
