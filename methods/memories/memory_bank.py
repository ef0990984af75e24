"""A memory of every training image: Wu et al. 2018, arxiv.org/abs/1805.01978, section 3.1."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.methods.memories.random_rows import random_unit_rows
from kilobatch.methods.method import Memory


class MemoryBank(Memory):
    """A unit row for each of `images` training images, divided among ranks: rank i % W has row i. dim: D, of a row.

    A rank holds 4 * images * D / W bytes: 656 MB / W for ImageNet's 1,281,167 images at 128 dimensions. The rows start
    random, the same on any number of ranks, by torch's initial seed. To be built inside the process group that uses it.
    """

    rows: Tensor  # (this rank's share, D): the row of image i at i // W

    def __init__(self, images: int, dim: int) -> None:
        super().__init__()
        self.images = images
        share = len(range(collectives.rank(), images, collectives.world_size()))
        self.register_buffer("rows", torch.empty(share, dim))
        for first, block in random_unit_rows(images, dim):
            is_local, positions = self.locate(torch.arange(first, first + len(block)))
            self.rows[positions[is_local]] = block[is_local]

    def locate(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """index, of images -> True where an image's row is on this rank; the position of the row on its rank."""
        return index % collectives.world_size() == collectives.rank(), index // collectives.world_size()

    @torch.no_grad()
    def fetch(self, index: Tensor) -> Tensor:
        """index (n,) int64, this rank's images, the same n on every rank -> their rows (n, D).

        Each rank sends (W - 1) n D numbers, zeros for rows that it does not hold.
        """
        is_local, positions = self.locate(collectives.gather(index))
        local = self.rows.new_zeros(len(is_local), self.rows.shape[1])
        local[is_local] = self.rows[positions[is_local]]
        return collectives.reduce_scatter(local)

    @torch.no_grad()
    def follow(self, index: Tensor, fresh: Tensor, momentum: float) -> None:
        """Moves rows 1 - momentum of the way to fresh (n, D), the embeddings of this rank's images index (n,), and
        scales them to length 1. If an image is in the global batch twice, the later embedding counts. Each rank sends
        (W - 1) n D numbers."""
        index, fresh = collectives.gather(index), collectives.gather(fresh.to(self.rows.dtype))
        order = index.argsort(stable=True)
        is_last = torch.ones_like(order, dtype=torch.bool)
        is_last[:-1] = index[order][1:] != index[order][:-1]
        last = order[is_last]
        is_local, positions = self.locate(index[last])
        positions = positions[is_local]
        moved = torch.lerp(self.rows[positions], fresh[last[is_local]], 1 - momentum)
        self.rows[positions] = F.normalize(moved, dim=1)

    def reshard(self, ranks: int, held: Callable[[str, int], Tensor]) -> None:
        """Reads row i from rank i % ranks of the checkpoint, position i // ranks."""
        index = torch.arange(collectives.rank(), self.images, collectives.world_size())
        for r in range(ranks):
            rows = held("rows", r)
            if rows.shape != (expected := (len(range(r, self.images, ranks)), self.rows.shape[1])):
                raise UserError(
                    f"rank {r} of {ranks} held {tuple(rows.shape)} of the memory bank's rows, which should be "
                    f"{expected} for {self.images} images; resume with the recipe and the data that the checkpoint was "
                    "written with"
                )
            from_r = index % ranks == r
            self.rows[from_r.to(self.rows.device)] = rows[index[from_r] // ranks].to(self.rows)
