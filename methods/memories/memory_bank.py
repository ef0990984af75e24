"""A memory of every training image: Wu et al. 2018, arxiv.org/abs/1805.01978, section 3.1."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.errors import Refusal
from kilobatch.methods import collectives as across
from kilobatch.methods.method import Memory

BLOCK = 1024  # random rows that are made at a time


class Bank(Memory):
    """A unit row for each of `images` training images, over ranks: row i is with rank i % W. dim: D, of a row.

    4 * images * D / W bytes on each: 656 MB / W for ImageNet's 1,281,167 images at 128. It starts with random unit
    rows, the same on any number of ranks, by torch's initial seed. Build it inside the process group that it serves.
    """

    rows: Tensor  # (this rank's share, D): image i's at i // W

    def __init__(self, images: int, dim: int) -> None:
        super().__init__()
        self.images = images
        share = len(range(across.rank(), images, across.size()))
        self.register_buffer("rows", torch.empty(share, dim))
        for first in range(0, images, BLOCK):  # each rank draws all, and keeps its own
            generator = torch.Generator().manual_seed(torch.initial_seed() % 2**32 * 2**31 + first)
            block = F.normalize(torch.randn(BLOCK, dim, generator=generator), dim=1)[: images - first]
            mine, places = self.mine(torch.arange(first, first + len(block)))
            self.rows[places[mine]] = block[mine]

    def mine(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """index, of images -> whether each one's row is with this rank; where it stands among those of its rank."""
        return index % across.size() == across.rank(), index // across.size()

    @torch.no_grad()
    def fetch(self, index: Tensor) -> Tensor:
        """index (n,) int64, this rank's, the same n on every rank -> the rows (n, D) of these images.

        Each rank sends (W - 1) n D numbers, zeros for rows that it does not hold.
        """
        mine, places = self.mine(across.gather(index))
        held = self.rows.new_zeros(len(mine), self.rows.shape[1])
        held[mine] = self.rows[places[mine]]
        return across.scatter_sum(held)

    @torch.no_grad()
    def follow(self, index: Tensor, fresh: Tensor, momentum: float) -> None:
        """Rows move 1 - momentum of the way to fresh (n, D), the embeddings of this rank's images index (n,), and back
        to length 1. Of an image that is in the global batch twice, the later counts. Sent: (W - 1) n D numbers."""
        index, fresh = across.gather(index), across.gather(fresh.to(self.rows.dtype))
        order = index.argsort(stable=True)
        last = torch.ones_like(order, dtype=torch.bool)
        last[:-1] = index[order][1:] != index[order][:-1]
        latest = order[last]
        mine, places = self.mine(index[latest])
        places = places[mine]
        moved = torch.lerp(self.rows[places], fresh[latest[mine]], 1 - momentum)
        self.rows[places] = F.normalize(moved, dim=1)

    def reshard(self, ranks: int, held: Callable[[str, int], Tensor]) -> None:
        """Row i is read from rank i % ranks, where it stood at i // ranks."""
        index = torch.arange(across.rank(), self.images, across.size())
        for r in range(ranks):
            rows = held("rows", r)
            if rows.shape != (expected := (len(range(r, self.images, ranks)), self.rows.shape[1])):
                raise Refusal(
                    f"rank {r} of {ranks} held {tuple(rows.shape)} of the memory bank's rows, which should be "
                    f"{expected} for {self.images} images; resume with the recipe and the data that the checkpoint was "
                    "written with"
                )
            theirs = index % ranks == r
            self.rows[theirs.to(self.rows.device)] = rows[index[theirs] // ranks].to(self.rows)
