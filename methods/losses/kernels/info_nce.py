"""The kernel of InfoNCE: one pass over a queue's keys, in which no similarity leaves the chip.

The equations are in methods/losses/info_nce.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kilobatch.methods.losses.kernels.blocks import DTYPES, MASKED, load_rows, plan_launch, product
from kilobatch.methods.options import Operands


def sums(scaled: Tensor, keys: Tensor, excluded: Tensor | None, operands: Operands) -> Tensor:
    """The sums [sum e k | sum e] over keys k, e = e^s: scaled (N, D) fp32, keys (m, D) of any type -> (N, D + 1) fp32.

    excluded (N,) int64: for each query, the row of `keys` that does not count; none where that is negative.
    """
    if operands == "fp16":  # fp16 cannot hold e^40
        row_max = torch.full_like(scaled[:, 0], -torch.inf)
        shifted_sums, shift = sums_with_shift(scaled, keys, row_max, excluded, operands)
        return shifted_sums * shift.exp()[:, None]
    partial_sums, _ = _launch(scaled, keys, None, excluded, operands)
    return partial_sums[0] if len(partial_sums) == 1 else partial_sums.sum(0)


def sums_with_shift(
    scaled: Tensor, keys: Tensor, row_max: Tensor, excluded: Tensor | None, operands: Operands
) -> tuple[Tensor, Tensor]:
    """The sums of `sums` with e = e^(s - shift), (N, D + 1), and shift (N,), the maximum of row_max (N,) and all s."""
    partial_sums, maxima = _launch(scaled, keys, row_max, excluded, operands)
    shift = maxima.amax(0)
    return (partial_sums * (maxima - shift).exp()[..., None]).sum(0), shift


def _launch(
    scaled: Tensor, keys: Tensor, row_max: Tensor | None, excluded: Tensor | None, operands: Operands
) -> tuple[Tensor, Tensor]:
    """For each split of the keys: sums (splits, N, D + 1) and, if row_max is given, their shifts (splits, N)."""
    dtype = DTYPES[operands]
    left = scaled.to(dtype).contiguous()
    if keys.dtype.itemsize >= dtype.itemsize:  # the kernel itself converts narrower ones
        keys = keys.to(dtype)
    keys = keys.contiguous()
    launch = plan_launch(len(scaled), len(keys), scaled.shape[1], operands, scaled.device)
    partial_sums = scaled.new_empty(launch.column_programs, len(scaled), scaled.shape[1] + 1)
    maxima = scaled.new_empty(launch.column_programs, len(scaled))
    # Any tensor may stand for one that is not given: the kernel does not read it.
    excluded_or_any = left if excluded is None else excluded
    row_max_or_any = partial_sums if row_max is None else row_max
    arguments = (left, keys, excluded_or_any, row_max_or_any, partial_sums, maxima, len(left), len(keys))
    modes = {"EXCLUDE": excluded is not None, "ONLINE_MAX": row_max is not None}
    launch.run(_sums, *arguments, launch.columns_per_program, **modes)
    return partial_sums, maxima


@triton.jit
def _sums(
    scaled, keys, excluded, initial_max, partial_sums, maxima, rows, columns, columns_per_program,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, WEIGHT_SCALE: tl.constexpr, UPCAST: tl.constexpr,
    EXCLUDE: tl.constexpr, ONLINE_MAX: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    left = load_rows(scaled, i, rows, D, BD)
    start = tl.program_id(1) * columns_per_program
    stop = tl.minimum(start + columns_per_program, columns)
    total = tl.zeros([BM], tl.float32)
    weighted = tl.zeros([BM, BD], tl.float32)
    row_max = tl.full([BM], MASKED, tl.float32)
    if ONLINE_MAX:
        row_max = tl.maximum(row_max, tl.load(initial_max + i, mask=i < rows, other=0.0))
    excluded_row = tl.full([BM], -1, tl.int64)
    if EXCLUDE:
        excluded_row = tl.load(excluded + i, mask=i < rows, other=-1)
    for j0 in range(start, stop, BN):
        j = j0 + tl.arange(0, BN)
        right = load_rows(keys, j, stop, D, BD).to(OPERAND)
        s = product(left, tl.trans(right), tl.zeros([BM, BN], tl.float32), PRECISION, UPCAST)
        if j0 + BN > stop:
            s = tl.where((j >= stop)[None, :], MASKED, s)
        if EXCLUDE:
            s = tl.where(j[None, :] == excluded_row[:, None], MASKED, s)
        if ONLINE_MAX:
            new_max = tl.maximum(row_max, tl.max(s, 1))
            rescale = tl.exp(row_max - new_max)
            total *= rescale
            weighted *= rescale[:, None]
            row_max = new_max
            s -= new_max[:, None]
        e = tl.exp(s)
        total += tl.sum(e, 1)
        weighted = product((e * WEIGHT_SCALE).to(OPERAND), right, weighted, PRECISION, UPCAST)
    row = tl.program_id(1).to(tl.int64) * rows + i
    d = tl.arange(0, BD)
    tl.store(
        partial_sums + row[:, None] * (D + 1) + d[None, :],
        weighted * (1 / WEIGHT_SCALE),
        mask=(i < rows)[:, None] & (d < D)[None, :],
    )
    tl.store(partial_sums + row * (D + 1) + D, total, mask=i < rows)
    tl.store(maxima + row, row_max, mask=i < rows)
