"""A key's number stays with it: on any ranks, through wraps, and into a checkpoint's other number of ranks."""

import pytest
import torch
from torch import Tensor

from kilobatch.methods import collectives
from kilobatch.methods.memories.numbered_queue import NumberedQueue
from kilobatch.methods.memories.options import QueueOptions
from tests.helpers.process_groups import run_ranks

BATCH, DIM = 12, 4


def keys(step: int) -> Tensor:
    return torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(step))


def pairs(memory: NumberedQueue) -> list[tuple[float, int]]:
    """The first number of each key of this rank, and the key's number."""
    return [*zip(memory.filled()[:, 0].tolist(), memory.filled_numbers().tolist(), strict=True)]


def queue(placement: str, start: str, length: int = 36) -> NumberedQueue:
    torch.manual_seed(0)
    options = {"length": length, "placement": placement, "start": start}
    return NumberedQueue(QueueOptions.model_validate(options), DIM)


def history(placement: str, start: str) -> list[list[tuple[float, int]]]:
    memory, found = queue(placement, start), list[list[tuple[float, int]]]()
    world, rank = collectives.world_size(), collectives.rank()
    for step in range(5):
        found.append(pairs(memory))
        own = keys(step).chunk(world)[rank], (torch.arange(BATCH) + 100 * step + 1000).chunk(world)[rank]
        memory.push_numbered(*own)
    return found


@pytest.mark.parametrize("start", ["random", "empty"])
def test_numbers_are_the_same_on_any_ranks(start: str) -> None:
    whole = history("replicated", start)
    assert sorted(number for _, number in whole[0]) == ([*range(36)] if start == "random" else [])
    newest = dict(whole[4])
    assert all(newest[float(k[0])] == 1300 + i for i, k in enumerate(keys(3)))
    for placement in ("sharded", "replicated"):
        for world in (2, 3):
            ranks = run_ranks(world, history, placement, start)
            for step, want in enumerate(whole):
                parts = ranks if placement == "sharded" else ranks[:1]
                assert sorted(pair for rank in parts for pair in rank[step]) == sorted(want)


def test_another_number_of_ranks_reads_each_key_with_its_number() -> None:
    def held(name: str, rank: int) -> Tensor:
        return {"keys": of_ranks[rank].keys, "numbers": of_ranks[rank].numbers, "pushed": of_ranks[rank].pushed}[name]

    of_ranks = [queue("sharded", "random", length=18) for _ in range(2)]  # as two ranks of a queue of 36 hold them
    for rank, memory in enumerate(of_ranks):
        memory.push_numbered(keys(rank)[:7], torch.arange(7) + 100 * rank)
    whole = queue("sharded", "random")
    whole.reshard(2, held)
    assert sorted(pairs(whole)) == sorted(pair for memory in of_ranks for pair in pairs(memory))
