"""Kernels of CLIP's loss: its forward and its backward pass, in which no similarity leaves the chip.

The equations are in methods/losses/clip.py. The first pass sums a tile of similarities both by row and by column; each
block of rows has sums by column of its own, which are added in order. The second pass runs a kernel over all tiles for
each tower, with five products of rows where three would do: adding the gradients of a tile's columns over all blocks of
rows would need atomics, whose order is random.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kilobatch.methods.losses.kernels.blocks import MASKED, check_contiguous, load_rows, plan_launch, product
from kilobatch.methods.options import Operands

ROW_BLOCKS = 32  # row blocks in one launch; each writes a sum for every column, so this bounds the memory


def sums(own: Tensor, all_rows: Tensor, offset: int, bounded: bool, operands: Operands) -> tuple[Tensor, Tensor]:
    """The sums of methods.losses.clip._sums: own (n, D), all_rows (N, D), both as operands -> (n,) and (N,) fp32."""
    check_contiguous(own, all_rows)
    row_sums, column_sums = [], []
    height = ROW_BLOCKS * plan_launch(len(own), len(all_rows), own.shape[1], operands, own.device).options["BM"]
    for start in range(0, len(own), height):
        block = own[start : start + height]
        launch = plan_launch(len(block), len(all_rows), own.shape[1], operands, own.device)
        rows = own.new_empty(launch.column_programs, len(block), dtype=torch.float32)
        columns = own.new_empty(launch.row_programs, len(all_rows), dtype=torch.float32)
        arguments = (block, all_rows, rows, columns, len(block), len(all_rows), offset + start)
        launch.run(_sums, *arguments, launch.columns_per_program, ONLINE_MAX=not bounded)
        row_sums.append(_combine(rows, bounded))
        column_sums.append(_combine(columns, bounded))
    return torch.cat(row_sums), _combine(torch.stack(column_sums), bounded)


def _combine(parts: Tensor, bounded: bool) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return parts.sum(0) if bounded else parts.logsumexp(0)


def gradient(
    own: Tensor, all_rows: Tensor, offset: int, lse: Tensor, all_lse: Tensor, bounded: bool, operands: Operands
) -> Tensor:
    """The part of the gradient of own that comes from negatives, (n, D) fp32: the sum over j of W_ij row_j.

    own (n, D): rows of either tower, whose positives are rows `offset` and following of all_rows (N, D), of the other
    tower; both as operands. lse (n,), all_lse (N,) fp32. To get the gradient of the second tower's rows of all ranks,
    these are `own` and this rank's first tower `all_rows`; offset is then 0 or negative.
    """
    lse, all_lse = lse.contiguous(), all_lse.contiguous()
    check_contiguous(own, all_rows)
    launch = plan_launch(len(own), len(all_rows), own.shape[1], operands, own.device)
    du = own.new_empty(launch.column_programs, *own.shape, dtype=torch.float32)
    weights = ((-lse).exp_(), (-all_lse).exp_()) if bounded else (lse, all_lse)
    arguments = (own, all_rows, *weights, du, len(own), len(all_rows), offset)
    launch.run(_gradient, *arguments, launch.columns_per_program, ONLINE_MAX=not bounded)
    return du[0] if launch.column_programs == 1 else du.sum(0)


@triton.jit
def _similarities(left, right, positive_column, i, rows, j, j0, stop, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """(BM, BN), masked. Few tiles hold positives or an end of the matrix: only those are compared."""
    s = product(left, tl.trans(right), tl.zeros([left.shape[0], right.shape[0]], tl.float32), PRECISION, UPCAST)
    j1 = j0 + right.shape[0]
    has_positive = (j0 <= tl.max(positive_column)) & (j1 > tl.min(positive_column))
    if has_positive | (j1 > stop) | (tl.max(i) >= rows):
        masked = (j[None, :] == positive_column[:, None]) | (i >= rows)[:, None] | (j >= stop)[None, :]
        s = tl.where(masked, MASKED, s)
    return s


@triton.jit
def _sums(
    own, all_rows, row_sums, column_sums, rows, columns, offset, columns_per_program,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, WEIGHT_SCALE: tl.constexpr, UPCAST: tl.constexpr,
    ONLINE_MAX: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    left = load_rows(own, i, rows, D, BD)
    start = tl.program_id(1) * columns_per_program
    stop = tl.minimum(start + columns_per_program, columns)
    total = tl.zeros([BM], tl.float32)
    row_max = tl.full([BM], MASKED, tl.float32)
    for j0 in range(start, stop, BN):
        j = j0 + tl.arange(0, BN)
        right = load_rows(all_rows, j, stop, D, BD)
        s = _similarities(left, right, offset + i, i, rows, j, j0, stop, PRECISION, UPCAST)
        if ONLINE_MAX:
            new_max = tl.maximum(row_max, tl.max(s, 1))
            total = total * tl.exp(row_max - new_max) + tl.sum(tl.exp(s - new_max[:, None]), 1)
            row_max = new_max
            column_max = tl.max(s, 0)
            tile_sums = column_max + tl.log(tl.sum(tl.exp(s - tl.expand_dims(column_max, 0)), 0))
        else:
            e = tl.exp(s)
            total += tl.sum(e, 1)
            tile_sums = tl.sum(e, 0)
        tl.store(column_sums + tl.program_id(0).to(tl.int64) * columns + j, tile_sums, mask=j < stop)
    if ONLINE_MAX:
        total = row_max + tl.log(total)
    tl.store(row_sums + tl.program_id(1).to(tl.int64) * rows + i, total, mask=i < rows)


@triton.jit
def _gradient(
    own, all_rows, weights, all_weights, du, rows, columns, offset, columns_per_program,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, WEIGHT_SCALE: tl.constexpr, UPCAST: tl.constexpr,
    ONLINE_MAX: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    left = load_rows(own, i, rows, D, BD)
    weight_i = tl.load(weights + i, mask=i < rows, other=0.0)
    start = tl.program_id(1) * columns_per_program
    stop = tl.minimum(start + columns_per_program, columns)
    sums = tl.zeros([BM, BD], tl.float32)
    for j0 in range(start, stop, BN):
        j = j0 + tl.arange(0, BN)
        right = load_rows(all_rows, j, stop, D, BD)
        weight_j = tl.load(all_weights + j, mask=j < stop, other=0.0)
        s = _similarities(left, right, offset + i, i, rows, j, j0, stop, PRECISION, UPCAST)
        if ONLINE_MAX:
            w = tl.exp(s - weight_i[:, None]) + tl.exp(s - weight_j[None, :])
        else:
            w = tl.exp(s) * (weight_i[:, None] + weight_j[None, :])
        sums = product((w * WEIGHT_SCALE).to(OPERAND), right, sums, PRECISION, UPCAST)
    d = tl.arange(0, BD)
    offsets = (tl.program_id(1).to(tl.int64) * rows + i)[:, None] * D + d[None, :]
    tl.store(du + offsets, sums * (1 / WEIGHT_SCALE), mask=(i < rows)[:, None] & (d < D)[None, :])
