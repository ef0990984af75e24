"""Random unit rows for a memory's start, the same on any number of ranks."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1024  # rows that are drawn at a time


def random_unit_rows(count: int, dim: int) -> Iterator[tuple[int, Tensor]]:
    """Yields `count` random unit rows in blocks: the number of a block's first row, and its rows (at most BLOCK, dim).

    Each block has a generator of its own, seeded by torch's initial seed and its first row. Every rank draws all blocks
    and keeps its own rows, so that the rows depend neither on the rank nor on the number of ranks.
    """
    for first in range(0, count, BLOCK):
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**32 * 2**31 + first)
        yield first, F.normalize(torch.randn(BLOCK, dim, generator=generator), dim=1)[: count - first]
