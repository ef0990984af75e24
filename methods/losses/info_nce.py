"""InfoNCE against a queue, and a queue's log-sum-exp, each in one pass over the keys of this rank."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from kilobatch.methods import collectives
from kilobatch.methods.options import LARGEST_EXPONENT, Operands
from kilobatch.methods.tiles.torch_ops import (
    CPU_TILE,
    MASKED_SIMILARITY,
    add_product_,
    as_operand,
    buffer,
    exp_and_sum_,
    fused,
    product_,
    sides,
)


class QueueNCE(Function):
    """InfoNCE (MoCo, eq. 1): the mean of the losses of this rank's queries.

    q, k (n, D): this rank's unit queries and their keys. keys (m, D): this rank's part of the queue. sharded: True if
    the queue consists of the keys of all ranks.

    L_i = -log( e^s_i / (e^s_i + sum_j e^s_ij) ) = softplus(logsumexp_j s_ij - s_i), s_i = q_i k_i / temperature, j over
    the whole queue. The sum leaves the positive out, which keeps the digits of a small loss. With the share of the
    softmax that is not the positive's, a_i = sigmoid(logsumexp_j s_ij - s_i), the gradient of the sum of losses is

        dq_i = 1/temperature * ( sum_j e^s_ij k_j / (e^s_i + sum_j e^s_ij) - a_i k_i ).

    Both sums come from one pass, so the gradient is computed in the forward: each rank sums [sum e k | sum e] over its
    own keys, for the queries of all ranks, and a reduce-scatter gives every rank the totals of its own queries.

    extra_keys (n, S, D): for each query, keys of its own in addition to the queue; they get no gradient. excluded (N,)
    int64: for each query of all ranks, the row of `keys` that does not count for it; if negative, all count.

    operands: the type in which similarities with keys and sums over keys are computed (methods/options.py). The pass is
    a Triton kernel where methods.tiles.torch_ops.fused is true.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        keys: Tensor,
        sharded: bool,
        temperature: float,
        extra_keys: Tensor | None = None,
        excluded: Tensor | None = None,
        operands: Operands = "fp32",
    ) -> Tensor:
        scaled = q / temperature
        positive = (scaled * k).sum(1)  # (n,)
        extra_keys = q.new_empty(len(q), 0, q.shape[1]) if extra_keys is None else extra_keys
        extra_similarities = (extra_keys @ scaled[:, :, None])[:, :, 0]  # (n, S)
        queries = collectives.gather(scaled) if sharded else scaled  # (N, D)
        if 1 / temperature <= LARGEST_EXPONENT:
            shift = torch.zeros_like(positive)
            sums = _sums(queries, keys, excluded, operands)
        else:
            # On a query's own rank its maximum starts with the positive and the extra keys, on others with -inf. So no
            # exponential below exceeds 1.
            row_max = torch.full_like(queries[:, 0], -torch.inf)
            own = collectives.local_rows(len(q), q.device) if sharded else slice(None)
            row_max[own] = torch.cat([positive[:, None], extra_similarities], 1).amax(1)
            sums, shift = _sums_with_shift(queries, keys, row_max, sharded, excluded, operands)
            shift = shift[own]
        totals = collectives.reduce_scatter(sums) if sharded else sums
        weighted, total = totals[:, :-1], totals[:, -1]  # (n, D), (n,)
        if extra_keys.shape[1]:
            e = (extra_similarities - shift[:, None]).exp()
            weighted, total = weighted + (e[:, None] @ extra_keys)[:, 0], total + e.sum(1)
        margin = total.log() + shift - positive
        denominator = total + (positive - shift).exp()
        dq = weighted / denominator[:, None] - margin.sigmoid()[:, None] * k
        ctx.save_for_backward(dq / (len(q) * temperature))
        return -F.logsigmoid(-margin).mean()  # softplus, but torch's is linear beyond 20

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dq,) = ctx.saved_tensors
        return dq * grads[0], None, None, None, None, None, None, None


class QueueLogSumExp(Function):
    """The log-sum-exp of each row's similarities with the keys of the whole queue, (n,); -inf for an empty queue.

    scaled (n, D): this rank's unit rows divided by the temperature; keys, sharded: as QueueNCE's; bounded: no
    similarity exceeds methods.options.LARGEST_EXPONENT. Row i: log sum_j e^s_ij, s = scaled keys^T.

    Its gradient, the mean of keys weighted by the softmax, comes from the same pass; the backward sends nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, scaled: Tensor, keys: Tensor, sharded: bool, bounded: bool, operands: Operands = "fp32"
    ) -> Tensor:
        queries = collectives.gather(scaled) if sharded else scaled  # (N, D)
        if bounded:
            sums, shift = _sums(queries, keys, None, operands), torch.zeros_like(scaled[:, 0])
        else:
            row_max = torch.full_like(queries[:, 0], MASKED_SIMILARITY)
            sums, shift = _sums_with_shift(queries, keys, row_max, sharded, None, operands)
            shift = shift[collectives.local_rows(len(scaled), scaled.device)] if sharded else shift
        totals = collectives.reduce_scatter(sums) if sharded else sums
        weighted, total = totals[:, :-1], totals[:, -1]
        ctx.save_for_backward(weighted / total.clamp_min(torch.finfo(total.dtype).tiny)[:, None])
        return total.log() + shift

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mean,) = ctx.saved_tensors
        return grads[0][:, None] * mean, None, None, None, None


def _sums(scaled: Tensor, keys: Tensor, excluded: Tensor | None, operands: Operands) -> Tensor:
    """The sums [sum e k | sum e] over keys k, e = e^s: scaled (N, D), keys (m, D) -> (N, D + 1)."""
    if fused("a queue's InfoNCE", scaled, operands):
        from kilobatch.methods.losses.kernels import info_nce

        return info_nce.sums(scaled, keys, excluded, operands)
    weighted, total = torch.zeros_like(scaled), torch.zeros_like(scaled[:, 0])
    for rows, tile, s in _similarities(scaled, keys, excluded, operands):
        exp_and_sum_(s, total[rows])
        add_product_(weighted[rows], s.to(tile.dtype), tile)
    return torch.cat([weighted, total[:, None]], 1)


def _sums_with_shift(
    scaled: Tensor, keys: Tensor, row_max: Tensor, sharded: bool, excluded: Tensor | None, operands: Operands
) -> tuple[Tensor, Tensor]:
    """The sums of _sums with e = e^(s - shift), (N, D + 1), and shift (N,), the maximum of row_max and s over ranks."""
    if fused("a queue's InfoNCE", scaled, operands):
        from kilobatch.methods.losses.kernels import info_nce

        sums, local_shift = info_nce.sums_with_shift(scaled, keys, row_max, excluded, operands)
        shift = collectives.all_reduce_max(local_shift) if sharded else local_shift
        return sums * (local_shift - shift).exp()[:, None], shift
    sums = scaled.new_zeros(len(scaled), scaled.shape[1] + 1)
    for rows, tile, s in _similarities(scaled, keys, excluded, operands):
        new_max = torch.maximum(row_max[rows], s.amax(1))
        sums[rows] *= (row_max[rows] - new_max).exp()[:, None]
        row_max[rows] = new_max
        e = s.sub_(new_max[:, None]).exp_()
        add_product_(sums[rows, :-1], e.to(tile.dtype), tile)
        sums[rows, -1] += e.sum(1)
    shift = collectives.all_reduce_max(row_max) if sharded else row_max
    sums *= (row_max - shift).exp()[:, None]
    return sums, shift


def _similarities(
    scaled: Tensor, keys: Tensor, excluded: Tensor | None, operands: Operands
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields, tile by tile, rows of scaled, the tile's keys as operands, and the similarities of the two in one buffer
    that may be overwritten. The outer loop is over keys, so that stored halves are converted once. excluded: as
    QueueNCE's.
    """
    own = as_operand(scaled, operands)
    height, width = sides(scaled, CPU_TILE)
    scratch = buffer(own, keys, (height, width))
    for first in range(0, len(keys), width):
        tile = keys[first : first + width].to(own.dtype)
        for start in range(0, len(scaled), height):
            rows = slice(start, start + height)
            left = own[rows]
            s = scratch[: len(left) * len(tile)].view(len(left), len(tile))
            product_(left, tile.T, s)
            if excluded is not None:
                row = excluded[rows, None] - first
                column = row.clamp(0, len(tile) - 1)
                s.scatter_(1, column, s.gather(1, column).where(row != column, MASKED_SIMILARITY))
            yield rows, tile, s
