"""A queue whose keys have numbers, by which chance is drawn for a key wherever it is held."""

from collections.abc import Callable

import torch
from torch import Tensor

from kilobatch.methods import collectives
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue


class NumberedQueue(Queue):
    """A queue with an int64 for each key, which stays with it: the key of the sample that it was made of, and for those
    of a random start how many are newer. A key's place in a ring depends on the ranks, its number does not."""

    numbers: Tensor  # (this rank's share or all,) int64

    def __init__(self, options: QueueOptions, dim: int) -> None:
        super().__init__(options, dim)
        rank, ranks = (collectives.rank(), collectives.world_size()) if self.sharded else (0, 1)
        self.register_buffer("numbers", torch.arange(len(self.keys)).flip(0) * ranks + rank)

    def filled_numbers(self) -> Tensor:
        """(m,): those of the keys that filled() gives."""
        return self.numbers[: len(self.filled())]

    @torch.no_grad()
    def push_numbered(self, keys: Tensor, numbers: Tensor) -> None:
        """As push, with the numbers (n,) of the keys."""
        self._write(numbers if self.sharded else collectives.gather(numbers), self.numbers)
        self.push(keys)

    def _place(self, positions: Tensor, slots: Tensor, held: Callable[[str], Tensor]) -> None:
        super()._place(positions, slots, held)
        self.numbers[positions] = held("numbers")[slots].to(self.numbers)
