"""InfoNCE's one pass over a queue's keys (methods/losses/info_nce.py has the equations): no similarity leaves the
chip."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kilobatch.methods.losses.kernels.blocks import DTYPES, LEFT_OUT, launch, load_rows, product
from kilobatch.methods.options import Operands


def sums(scaled: Tensor, keys: Tensor, without: Tensor | None, operands: Operands) -> Tensor:
    """scaled (N, D) fp32, keys (m, D) of any floating type -> (N, D + 1) fp32: [sum e k | sum e] over keys, e = e^s.

    without (N,) int64: of each query, the row of `keys` that does not count; none where that is negative.
    """
    if operands == "fp16":  # which holds no e^40
        found, shift = careful_sums(scaled, keys, torch.full_like(scaled[:, 0], -torch.inf), without, operands)
        return found * shift.exp()[:, None]
    found, _ = _run(scaled, keys, None, without, operands)
    return found[0] if len(found) == 1 else found.sum(0)


def careful_sums(
    scaled: Tensor, keys: Tensor, highest: Tensor, without: Tensor | None, operands: Operands
) -> tuple[Tensor, Tensor]:
    """As `sums`, of e^(s - shift): -> sums (N, D + 1) and shift (N,), the largest of highest (N,) and all s."""
    found, tops = _run(scaled, keys, highest, without, operands)
    shift = tops.amax(0)
    return (found * (tops - shift).exp()[..., None]).sum(0), shift


def _run(
    scaled: Tensor, keys: Tensor, highest: Tensor | None, without: Tensor | None, operands: Operands
) -> tuple[Tensor, Tensor]:
    """By each split of the keys: sums (splits, N, D + 1) and, where highest is given, their shifts (splits, N)."""
    kind = DTYPES[operands]
    left = scaled.to(kind).contiguous()
    keys = (keys if keys.dtype.itemsize < kind.itemsize else keys.to(kind)).contiguous()  # else widened there
    run = launch(len(scaled), len(keys), scaled.shape[1], operands, scaled.device)
    found = scaled.new_empty(run.by_columns, len(scaled), scaled.shape[1] + 1)
    tops = scaled.new_empty(run.by_columns, len(scaled))
    # What is not given is not read.
    tensors = (left, keys, left if without is None else without, found if highest is None else highest, found, tops)
    careful = highest is not None
    run.start(_sums, *tensors, len(left), len(keys), run.per, WITHOUT=without is not None, CAREFUL=careful)
    return found, tops


@triton.jit
def _sums(
    scaled, keys, without, start_at, found, tops, rows, columns, per,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, LIFT: tl.constexpr, WIDEN: tl.constexpr,
    WITHOUT: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    left = load_rows(scaled, i, rows, D, BD)
    start = tl.program_id(1) * per
    stop = tl.minimum(start + per, columns)
    total = tl.zeros([BM], tl.float32)
    weighted = tl.zeros([BM, BD], tl.float32)
    highest = tl.full([BM], LEFT_OUT, tl.float32)
    if CAREFUL:
        highest = tl.maximum(highest, tl.load(start_at + i, mask=i < rows, other=0.0))
    left_out = tl.full([BM], -1, tl.int64)
    if WITHOUT:
        left_out = tl.load(without + i, mask=i < rows, other=-1)
    for j0 in range(start, stop, BN):
        j = j0 + tl.arange(0, BN)
        right = load_rows(keys, j, stop, D, BD).to(OPERAND)
        s = product(left, tl.trans(right), tl.zeros([BM, BN], tl.float32), PRECISION, WIDEN)
        if j0 + BN > stop:
            s = tl.where((j >= stop)[None, :], LEFT_OUT, s)
        if WITHOUT:
            s = tl.where(j[None, :] == left_out[:, None], LEFT_OUT, s)
        if CAREFUL:
            now = tl.maximum(highest, tl.max(s, 1))
            shrink = tl.exp(highest - now)
            total *= shrink
            weighted *= shrink[:, None]
            highest = now
            s -= now[:, None]
        e = tl.exp(s)
        total += tl.sum(e, 1)
        weighted = product((e * LIFT).to(OPERAND), right, weighted, PRECISION, WIDEN)
    row = tl.program_id(1).to(tl.int64) * rows + i
    d = tl.arange(0, BD)
    tl.store(
        found + row[:, None] * (D + 1) + d[None, :], weighted * (1 / LIFT), mask=(i < rows)[:, None] & (d < D)[None, :]
    )
    tl.store(found + row * (D + 1) + D, total, mask=i < rows)
    tl.store(tops + row, highest, mask=i < rows)
