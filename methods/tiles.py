"""What a tiled loss does with a tile of similarities: torch's operations, or one compiled pass for fp32 on a CPU.

There the pass takes 0.25 ns a number, where torch's exponential alone takes 1.6, and leaves the matrix products alone.
It runs on one thread, so many threads are left to torch.
"""

import torch
from torch import Tensor

MOST_THREADS = 8  # from there on, as many threads share torch's operations for no longer than one needs for the pass


def exp_and_sum_(s: Tensor, rows: Tensor, columns: Tensor | None = None) -> None:
    """s (R, C) becomes e^s; its sums are added to rows (R,) and, if given, columns (C,). Compiled: for s up to 88."""
    if _compiled(s):
        from methods import tiles_compiled  # numba takes a quarter of a second to import

        tiles_compiled.exp_and_sum(s.numpy(), rows.numpy(), None if columns is None else columns.numpy())
        return
    s.exp_()
    rows += s.sum(1)
    if columns is not None:
        columns += s.sum(0)


def exp_and_weigh_(s: Tensor, rows: Tensor, columns: Tensor) -> None:
    """s (R, C) becomes e^s_ij (rows_i + columns_j); rows (R,), columns (C,). Compiled: for s up to 88."""
    if _compiled(s):
        from methods import tiles_compiled

        tiles_compiled.exp_and_weigh(s.numpy(), rows.numpy(), columns.numpy())
        return
    s.exp_().mul_(rows[:, None] + columns)


def _compiled(s: Tensor) -> bool:
    return s.device.type == "cpu" and s.dtype == torch.float32 and torch.get_num_threads() <= MOST_THREADS
