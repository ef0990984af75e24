"""The two passes of NT-Xent (methods/losses/nt_xent.py has the equations), one kernel each: no similarity leaves the
chip.

Both run over tiles of similarities of this rank's rows with the rows of all ranks: the first sums them up by row, the
second makes them anew and multiplies them with the rows at once, as in Dao et al. 2022, arxiv.org/abs/2205.14135.
None uses the symmetry within a rank, as the tiled form does: sums by column would need atomics, in an order by chance.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kilobatch.methods.losses.kernels.blocks import LEFT_OUT, contiguous, launch, load_rows, product
from kilobatch.methods.options import Operands


def negatives(u: Tensor, every: Tensor, first: int, bounded: bool, operands: Operands) -> Tensor:
    """u (2n, D), this rank's rows, which stand from row `first` on in every (M, D), both as operands -> (2n,) fp32: the
    log-sum-exp of each one's similarities with its negatives; bounded: of similarities that need no maximum taken out.
    """
    contiguous(u, every)
    run = launch(len(u), len(every), u.shape[1], operands, u.device)
    sums = u.new_empty(run.by_columns, len(u), dtype=torch.float32)
    run.start(_negatives, u, every, sums, len(u), len(every), first, run.per, CAREFUL=not bounded)
    return sums.sum(0).log_() if bounded else sums.logsumexp(0)


def gradient(
    u: Tensor,
    own: Tensor,
    every: Tensor,
    first: int,
    lse: Tensor,
    minus: Tensor,
    scale: Tensor,
    bounded: bool,
    operands: Operands,
) -> Tensor:
    """u (2n, D) fp32; own, every: as u and every of `negatives`; lse (M,) fp32: over all but the row itself -> (2n, D):
    scale times [ sum over negatives k of (P_ik + P_ki) every_k - minus_i u_p ], p the other view; scale: 0-dim.
    """
    contiguous(u, own, every, lse, minus)
    run = launch(len(u), len(every), u.shape[1], operands, u.device)
    du = u.new_empty(run.by_columns, *u.shape)
    weights = (-lse).exp_() if bounded else lse
    tensors = (u, own, every, weights, minus, scale, du)
    run.start(_gradient, *tensors, len(u), len(every), first, run.per, CAREFUL=not bounded)
    return du[0] if run.by_columns == 1 else du.sum(0)


@triton.jit
def _others(i, rows, first):
    """Local rows i -> where they and their other views stand among all rows."""
    i = tl.minimum(i, rows - 1)
    half = rows // 2
    return first + i, first + tl.where(i < half, i + half, i - half)


@triton.jit
def _similarities(left, right, itself, positive, j, j0, stop, low, high, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """(BM, BN); few tiles have an anchor itself, its positive or the matrix's end: only those are looked through."""
    s = product(left, tl.trans(right), tl.zeros([left.shape[0], right.shape[0]], tl.float32), PRECISION, WIDEN)
    j1 = j0 + right.shape[0]
    of_rows = (j0 <= tl.max(itself)) & (j1 > tl.min(itself))
    of_positives = (j0 <= high) & (j1 > low)
    if of_rows | of_positives | (j1 > stop):
        no_negative = (j[None, :] == itself[:, None]) | (j[None, :] == positive[:, None]) | (j >= stop)[None, :]
        s = tl.where(no_negative, LEFT_OUT, s)
    return s


@triton.jit
def _negatives(
    u, every, sums, rows, columns, first, per,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, LIFT: tl.constexpr, WIDEN: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    left = load_rows(u, i, rows, D, BD)
    itself, positive = _others(i, rows, first)
    low, high = tl.min(positive), tl.max(positive)
    start = tl.program_id(1) * per
    stop = tl.minimum(start + per, columns)
    total = tl.zeros([BM], tl.float32)
    highest = tl.full([BM], LEFT_OUT, tl.float32)
    for j0 in range(start, stop, BN):
        j = j0 + tl.arange(0, BN)
        right = load_rows(every, j, stop, D, BD)
        s = _similarities(left, right, itself, positive, j, j0, stop, low, high, PRECISION, WIDEN)
        if CAREFUL:
            now = tl.maximum(highest, tl.max(s, 1))
            total = total * tl.exp(highest - now) + tl.sum(tl.exp(s - now[:, None]), 1)
            highest = now
        else:
            total += tl.sum(tl.exp(s), 1)
    if CAREFUL:
        total = highest + tl.log(total)
    tl.store(sums + tl.program_id(1).to(tl.int64) * rows + i, total, mask=i < rows)


@triton.jit
def _gradient(
    u, own, every, weights, minus, scale, du, rows, columns, first, per,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, LIFT: tl.constexpr, WIDEN: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    left = load_rows(own, i, rows, D, BD)
    itself, positive = _others(i, rows, first)
    low, high = tl.min(positive), tl.max(positive)
    weight_i = tl.load(weights + itself)
    start = tl.program_id(1) * per
    stop = tl.minimum(start + per, columns)
    sums = tl.zeros([BM, BD], tl.float32)
    for j0 in range(start, stop, BN):
        j = j0 + tl.arange(0, BN)
        right = load_rows(every, j, stop, D, BD)
        weight_j = tl.load(weights + j, mask=j < stop, other=0.0)
        s = _similarities(left, right, itself, positive, j, j0, stop, low, high, PRECISION, WIDEN)
        if CAREFUL:
            p = tl.exp(s - weight_i[:, None]) + tl.exp(s - weight_j[None, :])
        else:
            p = tl.exp(s) * (weight_i[:, None] + weight_j[None, :])
        sums = product((p * LIFT).to(OPERAND), right, sums, PRECISION, WIDEN)
    sums *= 1 / LIFT
    if tl.program_id(1) == 0:  # for all of a row's programs
        other = load_rows(u, positive - first, rows, D, BD)
        sums -= tl.load(minus + i, mask=i < rows, other=0.0)[:, None] * other
    d = tl.arange(0, BD)
    at = (tl.program_id(1).to(tl.int64) * rows + i)[:, None] * D + d[None, :]
    tl.store(du + at, sums * tl.load(scale), mask=(i < rows)[:, None] & (d < D)[None, :])
