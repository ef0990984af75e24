"""Kernels of NT-Xent: its forward and its backward pass, in which no similarity leaves the chip.

The equations are in methods/losses/nt_xent.py. Both passes loop over tiles of similarities of this rank's rows with the
rows of all ranks: the first sums them by row; the second computes them again and multiplies them with the rows at once,
as in Dao et al. 2022, arxiv.org/abs/2205.14135. Neither uses the symmetry within a rank, as the tiled form does: sums
by column would need atomics, whose order is random.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kilobatch.methods.losses.kernels.blocks import MASKED, check_contiguous, load_rows, plan_launch, product
from kilobatch.methods.options import Operands


def negatives(u: Tensor, all_rows: Tensor, offset: int, bounded: bool, operands: Operands) -> Tensor:
    """The log-sum-exp of each row's similarities with its negatives, (2n,) fp32.

    u (2n, D): this rank's rows, which are rows `offset` and following of all_rows (M, D); both as operands. bounded:
    the similarities can be summed without a maximum taken out.
    """
    check_contiguous(u, all_rows)
    launch = plan_launch(len(u), len(all_rows), u.shape[1], operands, u.device)
    sums = u.new_empty(launch.column_programs, len(u), dtype=torch.float32)
    tensors = (u, all_rows, sums)
    launch.run(_negatives, *tensors, len(u), len(all_rows), offset, launch.columns_per_program, ONLINE_MAX=not bounded)
    return sums.sum(0).log_() if bounded else sums.logsumexp(0)


def gradient(
    u: Tensor,
    own: Tensor,
    all_rows: Tensor,
    offset: int,
    lse: Tensor,
    positive_weights: Tensor,
    scale: Tensor,
    bounded: bool,
    operands: Operands,
) -> Tensor:
    """The gradient (2n, D): scale * ( sum over negatives k of (P_ik + P_ki) row_k - positive_weights_i u_p ), p the
    other view of i.

    u (2n, D) fp32; own, all_rows: as u and all_rows of `negatives`; lse (M,) fp32: over all but the row itself; scale:
    0-dim.
    """
    check_contiguous(u, own, all_rows, lse, positive_weights)
    launch = plan_launch(len(u), len(all_rows), u.shape[1], operands, u.device)
    du = u.new_empty(launch.column_programs, *u.shape)
    weights = (-lse).exp_() if bounded else lse
    tensors = (u, own, all_rows, weights, positive_weights, scale, du)
    launch.run(_gradient, *tensors, len(u), len(all_rows), offset, launch.columns_per_program, ONLINE_MAX=not bounded)
    return du[0] if launch.column_programs == 1 else du.sum(0)


@triton.jit
def _self_and_positive(i, rows, offset):
    """Local rows i -> the positions of them and of their other views among all rows."""
    i = tl.minimum(i, rows - 1)
    half = rows // 2
    return offset + i, offset + tl.where(i < half, i + half, i - half)


@triton.jit
def _similarities(
    left, right, self_column, positive_column, j, j0, stop, positive_min, positive_max,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(BM, BN), masked. Few tiles hold an anchor itself, its positive or the matrix's end: only those are compared."""
    s = product(left, tl.trans(right), tl.zeros([left.shape[0], right.shape[0]], tl.float32), PRECISION, UPCAST)
    j1 = j0 + right.shape[0]
    has_self = (j0 <= tl.max(self_column)) & (j1 > tl.min(self_column))
    has_positive = (j0 <= positive_max) & (j1 > positive_min)
    if has_self | has_positive | (j1 > stop):
        masked = (j[None, :] == self_column[:, None]) | (j[None, :] == positive_column[:, None]) | (j >= stop)[None, :]
        s = tl.where(masked, MASKED, s)
    return s


@triton.jit
def _negatives(
    u, all_rows, sums, rows, columns, offset, columns_per_program,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, WEIGHT_SCALE: tl.constexpr, UPCAST: tl.constexpr,
    ONLINE_MAX: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    left = load_rows(u, i, rows, D, BD)
    self_column, positive_column = _self_and_positive(i, rows, offset)
    positive_min, positive_max = tl.min(positive_column), tl.max(positive_column)
    start = tl.program_id(1) * columns_per_program
    stop = tl.minimum(start + columns_per_program, columns)
    total = tl.zeros([BM], tl.float32)
    row_max = tl.full([BM], MASKED, tl.float32)
    for j0 in range(start, stop, BN):
        j = j0 + tl.arange(0, BN)
        right = load_rows(all_rows, j, stop, D, BD)
        s = _similarities(
            left, right, self_column, positive_column, j, j0, stop, positive_min, positive_max, PRECISION, UPCAST
        )
        if ONLINE_MAX:
            new_max = tl.maximum(row_max, tl.max(s, 1))
            total = total * tl.exp(row_max - new_max) + tl.sum(tl.exp(s - new_max[:, None]), 1)
            row_max = new_max
        else:
            total += tl.sum(tl.exp(s), 1)
    if ONLINE_MAX:
        total = row_max + tl.log(total)
    tl.store(sums + tl.program_id(1).to(tl.int64) * rows + i, total, mask=i < rows)


@triton.jit
def _gradient(
    u, own, all_rows, weights, positive_weights, scale, du, rows, columns, offset, columns_per_program,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, WEIGHT_SCALE: tl.constexpr, UPCAST: tl.constexpr,
    ONLINE_MAX: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    left = load_rows(own, i, rows, D, BD)
    self_column, positive_column = _self_and_positive(i, rows, offset)
    positive_min, positive_max = tl.min(positive_column), tl.max(positive_column)
    weight_i = tl.load(weights + self_column)
    start = tl.program_id(1) * columns_per_program
    stop = tl.minimum(start + columns_per_program, columns)
    sums = tl.zeros([BM, BD], tl.float32)
    for j0 in range(start, stop, BN):
        j = j0 + tl.arange(0, BN)
        right = load_rows(all_rows, j, stop, D, BD)
        weight_j = tl.load(weights + j, mask=j < stop, other=0.0)
        s = _similarities(
            left, right, self_column, positive_column, j, j0, stop, positive_min, positive_max, PRECISION, UPCAST
        )
        if ONLINE_MAX:
            p = tl.exp(s - weight_i[:, None]) + tl.exp(s - weight_j[None, :])
        else:
            p = tl.exp(s) * (weight_i[:, None] + weight_j[None, :])
        sums = product((p * WEIGHT_SCALE).to(OPERAND), right, sums, PRECISION, UPCAST)
    sums *= 1 / WEIGHT_SCALE
    if tl.program_id(1) == 0:  # one program subtracts it for all programs of a row
        positive_row = load_rows(u, positive_column - offset, rows, D, BD)
        sums -= tl.load(positive_weights + i, mask=i < rows, other=0.0)[:, None] * positive_row
    d = tl.arange(0, BD)
    offsets = (tl.program_id(1).to(tl.int64) * rows + i)[:, None] * D + d[None, :]
    tl.store(du + offsets, sums * tl.load(scale), mask=(i < rows)[:, None] & (d < D)[None, :])
