"""InfoNCE against a queue of keys, in one pass over the keys that this rank holds."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from kilobatch.methods import collectives as across
from kilobatch.methods.options import LARGEST_EXPONENT, Operands
from kilobatch.methods.tiles.torch_ops import (
    CPU_TILE,
    add_product_,
    as_operand,
    buffer,
    exp_and_sum_,
    fused,
    product_,
    sides,
)

LEFT_OUT = -1e30  # a similarity that counts for nothing; unlike -inf it can be subtracted from itself


class QueueNCE(Function):
    """q, k (n, D): this rank's unit queries and their keys; keys (m, D): those of the queue that this rank holds;
    sharded: whether the queue is all ranks' keys together -> the mean of the losses of its queries.

    L_i = -log( e^s_i / (e^s_i + sum_j e^s_ij) ) = softplus(logsumexp_j s_ij - s_i), s_i = q_i k_i / temperature, j over
    the whole queue. The sum leaves the positive out, to keep a small loss's digits. With the softmax's share of all but
    the positive, a_i = sigmoid(logsumexp_j s_ij - s_i), the gradient of the sum of losses is

        dq_i = 1/temperature * ( sum_j e^s_ij k_j / (e^s_i + sum_j e^s_ij) - a_i k_i ).

    Both sums come from one pass, so that the gradient is made in the forward: each rank adds [sum e k | sum e] over its
    own keys, for the queries of all ranks, and a reduce-scatter gives every rank the totals of its own queries.

    further (n, S, D): keys that stand beside the queue, of each query its own; they get no gradient. without (N,)
    int64: of each query of all ranks, the row of `keys` that does not count for it; where that is negative, all count.

    operands: what the similarities with keys and the sums over keys are computed from (methods/options.py).
    Where methods.tiles.torch_ops.fused says so the pass is a kernel of Triton's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        keys: Tensor,
        sharded: bool,
        temperature: float,
        further: Tensor | None = None,
        without: Tensor | None = None,
        operands: Operands = "fp32",
    ) -> Tensor:
        scaled = q / temperature
        positive = (scaled * k).sum(1)  # (n,)
        further = q.new_empty(len(q), 0, q.shape[1]) if further is None else further
        beside = (further @ scaled[:, :, None])[:, :, 0]  # (n, S)
        every = across.gather(scaled) if sharded else scaled  # (N, D)
        if 1 / temperature <= LARGEST_EXPONENT:
            shift = torch.zeros_like(positive)
            sums = _sums(every, keys, without, operands)
        else:
            # Of what a query's own rank knows of it; -inf on others. Then no exponential here exceeds 1.
            highest = torch.full_like(every[:, 0], -torch.inf)
            own = across.own(len(q), q.device) if sharded else slice(None)
            highest[own] = torch.cat([positive[:, None], beside], 1).amax(1)
            sums, shift = _careful_sums(every, keys, highest, sharded, without, operands)
            shift = shift[own]
        totals = across.scatter_sum(sums) if sharded else sums
        weighted, total = totals[:, :-1], totals[:, -1]  # (n, D), (n,)
        if further.shape[1]:
            e = (beside - shift[:, None]).exp()
            weighted, total = weighted + (e[:, None] @ further)[:, 0], total + e.sum(1)
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
    """scaled (n, D): this rank's rows, unit over the temperature; keys, sharded: as QueueNCE's; bounded: no similarity
    is beyond methods.options.LARGEST_EXPONENT -> (n,), for each row log sum_j e^s_ij over the whole queue, s = scaled
    keys^T; -inf where that is empty.

    Its gradient, the mean of keys weighed by the softmax, comes from the same pass, and nothing is sent afterwards.
    """

    @staticmethod
    def forward(
        ctx: Any, scaled: Tensor, keys: Tensor, sharded: bool, bounded: bool, operands: Operands = "fp32"
    ) -> Tensor:
        every = across.gather(scaled) if sharded else scaled  # (N, D)
        if bounded:
            sums, shift = _sums(every, keys, None, operands), torch.zeros_like(scaled[:, 0])
        else:
            highest = torch.full_like(every[:, 0], LEFT_OUT)
            sums, shift = _careful_sums(every, keys, highest, sharded, None, operands)
            shift = shift[across.own(len(scaled), scaled.device)] if sharded else shift
        totals = across.scatter_sum(sums) if sharded else sums
        weighted, total = totals[:, :-1], totals[:, -1]
        ctx.save_for_backward(weighted / total.clamp_min(torch.finfo(total.dtype).tiny)[:, None])
        return total.log() + shift

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mean,) = ctx.saved_tensors
        return grads[0][:, None] * mean, None, None, None, None


def _sums(scaled: Tensor, keys: Tensor, without: Tensor | None, operands: Operands) -> Tensor:
    """scaled (N, D), keys (m, D) -> (N, D + 1): [sum e k | sum e] over keys."""
    if fused("a queue's InfoNCE", scaled, operands):
        from kilobatch.methods.losses.kernels import info_nce as kernels

        return kernels.sums(scaled, keys, without, operands)
    weighted, total = torch.zeros_like(scaled), torch.zeros_like(scaled[:, 0])
    for rows, tile, s in _similarities(scaled, keys, without, operands):
        exp_and_sum_(s, total[rows])
        add_product_(weighted[rows], s.to(tile.dtype), tile)
    return torch.cat([weighted, total[:, None]], 1)


def _careful_sums(
    scaled: Tensor, keys: Tensor, highest: Tensor, sharded: bool, without: Tensor | None, operands: Operands
) -> tuple[Tensor, Tensor]:
    """As _sums, of e^(s - shift): -> sums (N, D + 1) and shift (N,), the largest of highest and all s, on all ranks."""
    if fused("a queue's InfoNCE", scaled, operands):
        from kilobatch.methods.losses.kernels import info_nce as kernels

        sums, here = kernels.careful_sums(scaled, keys, highest, without, operands)
        shift = across.all_max(here) if sharded else here
        return sums * (here - shift).exp()[:, None], shift
    sums = scaled.new_zeros(len(scaled), scaled.shape[1] + 1)
    for rows, tile, s in _similarities(scaled, keys, without, operands):
        now = torch.maximum(highest[rows], s.amax(1))
        sums[rows] *= (highest[rows] - now).exp()[:, None]
        highest[rows] = now
        e = s.sub_(now[:, None]).exp_()
        add_product_(sums[rows, :-1], e.to(tile.dtype), tile)
        sums[rows, -1] += e.sum(1)
    shift = across.all_max(highest) if sharded else highest
    sums *= (highest - shift).exp()[:, None]
    return sums, shift


def _similarities(
    scaled: Tensor, keys: Tensor, without: Tensor | None, operands: Operands
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Tile by tile: rows of scaled, keys as they are computed with, and s of the two in one buffer that the caller may
    overwrite. Keys outside, so that stored halves are widened once. without: as QueueNCE's.
    """
    own = as_operand(scaled, operands)
    height, width = sides(scaled, CPU_TILE)
    memory = buffer(own, keys, (height, width))
    for first in range(0, len(keys), width):
        tile = keys[first : first + width].to(own.dtype)
        for start in range(0, len(scaled), height):
            rows = slice(start, start + height)
            left = own[rows]
            s = memory[: len(left) * len(tile)].view(len(left), len(tile))
            product_(left, tile.T, s)
            if without is not None:
                at = without[rows, None] - first
                column = at.clamp(0, len(tile) - 1)
                s.scatter_(1, column, s.gather(1, column).where(at != column, LEFT_OUT))
            yield rows, tile, s
