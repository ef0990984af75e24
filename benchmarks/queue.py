"""InfoNCE with a queue of 65,536 keys, forward, backward and push on one CPU thread: time and peak memory of this
project's loss, a plain version, and lightly's loss with a memory bank.

    python -m benchmarks.queue                  # 256 and 1024 queries, 128 dimensions; about a minute
    python -m benchmarks.queue 1024 --rounds 7

benchmarks/turns.py says how it is measured; all three start from the same keys. Our tiles need 4 N K D floating-point
operations for N queries and K keys.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.turns import HEADER, arguments, measure, print_turn, row, take_turns

LENGTH, DIM, TEMPERATURE = 65_536, 128, 0.2


def plain(q: Tensor, k: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """The authors' code (facebookresearch/moco, moco/builder.py), which copies the queue; the oldest keys are first."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ keys.clone().T], 1) / temperature
    loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
    keys[: len(k)] = k
    return loss


def loss_of(name: str, keys: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "plain":
        return lambda q, k: plain(q, k, keys, TEMPERATURE)
    if name == "lightly":
        from lightly.loss import NTXentLoss  # pyright: ignore[reportMissingImports]

        loss = NTXentLoss(temperature=TEMPERATURE, memory_bank_size=keys.shape)
        loss.memory_bank.bank.copy_(keys)
        return loss
    from kilobatch.methods.losses.contrastive import info_nce
    from kilobatch.methods.memories.options import QueueOptions
    from kilobatch.methods.memories.queue import Queue
    from kilobatch.methods.networks.heads import unit

    queue = Queue(QueueOptions(length=len(keys)), DIM)
    queue.keys.copy_(keys)

    def ours(q: Tensor, k: Tensor) -> Tensor:
        k = unit(k)
        loss = info_nce(unit(q), k, queue, TEMPERATURE)
        queue.push(k)
        return loss

    return ours


def main() -> None:
    options = arguments(__doc__, "queries", [256, 1024])
    if options.measure:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        keys = F.normalize(torch.randn(LENGTH, DIM), dim=1)
        q, k = torch.randn(options.queries[0], DIM, requires_grad=True), torch.randn(options.queries[0], DIM)
        warm = keys[:1024].clone()
        loss_of(options.measure, warm)(torch.randn(64, DIM, requires_grad=True), torch.randn(64, DIM)).backward()
        loss = loss_of(options.measure, keys)
        print_turn(measure(lambda: loss(q, k)))
        return
    print(f"queries | {HEADER}")
    for queries in options.queries:
        turns = take_turns("benchmarks.queue", queries, options.rounds)
        print(f"{queries:7} | {row(turns, 4 * queries * LENGTH * DIM)}", flush=True)


if __name__ == "__main__":
    main()
