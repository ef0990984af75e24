"""The two passes of CLIP's loss (methods/losses/clip.py has the equations): no similarity leaves the chip.

In the first a tile of similarities is summed up both by row and by column; sums by column come from each block of rows
and are added in order. In the second each tower has a kernel's run of its own over all tiles, which makes five products
of rows where three would do: the gradient of a tile's columns, added up over all blocks of rows, would need atomics, in
an order by chance.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kilobatch.methods.losses.kernels.blocks import LEFT_OUT, contiguous, launch, load_rows, product
from kilobatch.methods.options import Operands

BLOCKS = 32  # of rows that have sums by column of their own at a time: these take as many numbers for each column


def sums(own: Tensor, every: Tensor, first: int, bounded: bool, operands: Operands) -> tuple[Tensor, Tensor]:
    """own (n, D), every (N, D), both as operands -> (n,) and (N,) fp32: as methods.losses.clip._sums."""
    contiguous(own, every)
    by_row, by_column = [], []
    height = BLOCKS * launch(len(own), len(every), own.shape[1], operands, own.device).options["BM"]
    for start in range(0, len(own), height):
        part = own[start : start + height]
        run = launch(len(part), len(every), own.shape[1], operands, own.device)
        rows = own.new_empty(run.by_columns, len(part), dtype=torch.float32)
        columns = own.new_empty(run.by_rows, len(every), dtype=torch.float32)
        tensors = (part, every, rows, columns)
        run.start(_sums, *tensors, len(part), len(every), first + start, run.per, CAREFUL=not bounded)
        by_row.append(_together(rows, bounded))
        by_column.append(_together(columns, bounded))
    return torch.cat(by_row), _together(torch.stack(by_column), bounded)


def _together(parts: Tensor, bounded: bool) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return parts.sum(0) if bounded else parts.logsumexp(0)


def gradient(
    own: Tensor, every: Tensor, first: int, lse: Tensor, every_lse: Tensor, bounded: bool, operands: Operands
) -> Tensor:
    """own (n, D), whose positives stand from row `first` on in every (N, D), both as operands and of either tower; lse
    (n,), every_lse (N,) fp32 -> (n, D) fp32: the sum over W, of negatives. Of a rank's own columns as `own`, `every`
    are its rows: `first` is then negative where they come before."""
    lse, every_lse = lse.contiguous(), every_lse.contiguous()
    contiguous(own, every)
    run = launch(len(own), len(every), own.shape[1], operands, own.device)
    du = own.new_empty(run.by_columns, *own.shape, dtype=torch.float32)
    weights = ((-lse).exp_(), (-every_lse).exp_()) if bounded else (lse, every_lse)
    run.start(_gradient, own, every, *weights, du, len(own), len(every), first, run.per, CAREFUL=not bounded)
    return du[0] if run.by_columns == 1 else du.sum(0)


@triton.jit
def _similarities(left, right, positive, i, rows, j, j0, stop, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """(BM, BN); few tiles have positives or an end of the matrix: only those are looked through."""
    s = product(left, tl.trans(right), tl.zeros([left.shape[0], right.shape[0]], tl.float32), PRECISION, WIDEN)
    j1 = j0 + right.shape[0]
    of_positives = (j0 <= tl.max(positive)) & (j1 > tl.min(positive))
    if of_positives | (j1 > stop) | (tl.max(i) >= rows):
        no_negative = (j[None, :] == positive[:, None]) | (i >= rows)[:, None] | (j >= stop)[None, :]
        s = tl.where(no_negative, LEFT_OUT, s)
    return s


@triton.jit
def _sums(
    own, every, by_row, by_column, rows, columns, first, per,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, LIFT: tl.constexpr, WIDEN: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    left = load_rows(own, i, rows, D, BD)
    start = tl.program_id(1) * per
    stop = tl.minimum(start + per, columns)
    total = tl.zeros([BM], tl.float32)
    highest = tl.full([BM], LEFT_OUT, tl.float32)
    for j0 in range(start, stop, BN):
        j = j0 + tl.arange(0, BN)
        right = load_rows(every, j, stop, D, BD)
        s = _similarities(left, right, first + i, i, rows, j, j0, stop, PRECISION, WIDEN)
        if CAREFUL:
            now = tl.maximum(highest, tl.max(s, 1))
            total = total * tl.exp(highest - now) + tl.sum(tl.exp(s - now[:, None]), 1)
            highest = now
            top = tl.max(s, 0)
            of_columns = top + tl.log(tl.sum(tl.exp(s - tl.expand_dims(top, 0)), 0))
        else:
            e = tl.exp(s)
            total += tl.sum(e, 1)
            of_columns = tl.sum(e, 0)
        tl.store(by_column + tl.program_id(0).to(tl.int64) * columns + j, of_columns, mask=j < stop)
    if CAREFUL:
        total = highest + tl.log(total)
    tl.store(by_row + tl.program_id(1).to(tl.int64) * rows + i, total, mask=i < rows)


@triton.jit
def _gradient(
    own, every, weights, every_weights, du, rows, columns, first, per,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, LIFT: tl.constexpr, WIDEN: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    left = load_rows(own, i, rows, D, BD)
    weight_i = tl.load(weights + i, mask=i < rows, other=0.0)
    start = tl.program_id(1) * per
    stop = tl.minimum(start + per, columns)
    sums = tl.zeros([BM, BD], tl.float32)
    for j0 in range(start, stop, BN):
        j = j0 + tl.arange(0, BN)
        right = load_rows(every, j, stop, D, BD)
        weight_j = tl.load(every_weights + j, mask=j < stop, other=0.0)
        s = _similarities(left, right, first + i, i, rows, j, j0, stop, PRECISION, WIDEN)
        if CAREFUL:
            w = tl.exp(s - weight_i[:, None]) + tl.exp(s - weight_j[None, :])
        else:
            w = tl.exp(s) * (weight_i[:, None] + weight_j[None, :])
        sums = product((w * LIFT).to(OPERAND), right, sums, PRECISION, WIDEN)
    d = tl.arange(0, BD)
    at = (tl.program_id(1).to(tl.int64) * rows + i)[:, None] * D + d[None, :]
    tl.store(du + at, sums * (1 / LIFT), mask=(i < rows)[:, None] & (d < D)[None, :])
