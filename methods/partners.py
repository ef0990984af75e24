"""Partners of samples, drawn within blocks of the global batch: for mixing, and for whatever else pairs samples."""

import torch
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.errors import UserError
from kilobatch.data.tensor_rng import PARTNERS, child


def draw_partners(batch: Batch, block: int) -> Tensor:
    """(n,) int64: of each sample the row of its partner, a random permutation of each `block` consecutive rows.

    It comes from the keys of the block's samples, and so from (seed, step, samples): as blocks divide a rank's batch,
    it is the same on any ranks. A permutation of a rank's whole batch would be another one for other ranks. To be
    called in Method.arrange, since chunks may divide blocks. Raises UserError where `block` does not divide the batch
    of a rank.
    """
    n = len(batch)
    if block < 1 or n % block:
        raise UserError(
            f"partners are drawn among {block} consecutive samples, which does not divide the {n} samples that a rank "
            f"has of each batch; use a block of {_nearest_divisor(n, block)}, or another data.batch"
        )
    draws = child(batch.keys, PARTNERS).view(-1, block)  # argsort of random numbers is a random permutation
    first = torch.arange(0, n, block, device=draws.device)
    return (first[:, None] + draws.argsort(1)).flatten()


def _nearest_divisor(n: int, block: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - block))
