"""InfoNCE against a queue of keys, in one pass over the keys that this rank holds."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from methods import across
from methods.memory_options import LARGEST_EXPONENT
from methods.tiles import exp_and_sum_

CPU_TILE = (256, 1024)  # queries x keys
ACCELERATOR_TILE = (2048, 8192)


class QueueNCE(Function):
    """q, k (n, D): this rank's unit queries and their keys; keys (m, D): those of the queue that this rank holds;
    sharded: whether the queue is all ranks' keys together -> the mean of the losses of its queries.

    L_i = -log( e^s_i / (e^s_i + sum_j e^s_ij) ) = softplus(logsumexp_j s_ij - s_i), s_i = q_i k_i / temperature, j over
    the whole queue. The sum leaves the positive out, to keep a small loss's digits. With the softmax's share of all but
    the positive, a_i = sigmoid(logsumexp_j s_ij - s_i), the gradient of the sum of losses is

        dq_i = 1/temperature * ( sum_j e^s_ij k_j / (e^s_i + sum_j e^s_ij) - a_i k_i ).

    Both sums come from one pass, so that the gradient is made in the forward: each rank adds [sum e k | sum e] over its
    own keys, for the queries of all ranks, and a reduce-scatter gives every rank the totals of its own queries.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, keys: Tensor, sharded: bool, temperature: float) -> Tensor:
        scaled = q / temperature
        positive = (scaled * k).sum(1)  # (n,)
        every = across.gather(scaled) if sharded else scaled  # (N, D)
        if 1 / temperature <= LARGEST_EXPONENT:
            shift = torch.zeros_like(positive)
            sums = _sums(every, keys)
        else:
            # Of a query's own positive on its own rank, -inf on others: then no exponential here exceeds 1.
            highest = torch.full_like(every[:, 0], -torch.inf)
            own = across.own(len(q), q.device) if sharded else slice(None)
            highest[own] = positive
            sums, shift = _careful_sums(every, keys, highest, sharded)
            shift = shift[own]
        if sharded and across.size() > 1:
            totals = sums.new_empty(len(q), sums.shape[1])
            dist.reduce_scatter_tensor(totals, sums)
        else:
            totals = sums
        weighted, total = totals[:, :-1], totals[:, -1]  # (n, D), (n,)
        margin = total.log() + shift - positive
        denominator = total + (positive - shift).exp()
        dq = weighted / denominator[:, None] - margin.sigmoid()[:, None] * k
        ctx.save_for_backward(dq / (len(q) * temperature))
        return -F.logsigmoid(-margin).mean()  # softplus, but torch's is linear beyond 20

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dq,) = ctx.saved_tensors
        return dq * grads[0], None, None, None, None


def _sums(scaled: Tensor, keys: Tensor) -> Tensor:
    """scaled (N, D), keys (m, D) -> (N, D + 1): [sum e k | sum e] over keys."""
    weighted, total = torch.zeros_like(scaled), torch.zeros_like(scaled[:, 0])
    for rows, tile, s in _similarities(scaled, keys):
        exp_and_sum_(s, total[rows])
        weighted[rows].addmm_(s, tile)
    return torch.cat([weighted, total[:, None]], 1)


def _careful_sums(scaled: Tensor, keys: Tensor, highest: Tensor, sharded: bool) -> tuple[Tensor, Tensor]:
    """As _sums, of e^(s - shift): -> sums (N, D + 1) and shift (N,), the largest of highest and all s, on all ranks."""
    sums = scaled.new_zeros(len(scaled), scaled.shape[1] + 1)
    for rows, tile, s in _similarities(scaled, keys):
        now = torch.maximum(highest[rows], s.amax(1))
        sums[rows] *= (highest[rows] - now).exp()[:, None]
        highest[rows] = now
        e = s.sub_(now[:, None]).exp_()
        sums[rows, :-1].addmm_(e, tile)
        sums[rows, -1] += e.sum(1)
    shift = highest.clone()
    if sharded and across.size() > 1:
        dist.all_reduce(shift, op=dist.ReduceOp.MAX)
    sums *= (highest - shift).exp()[:, None]
    return sums, shift


def _similarities(scaled: Tensor, keys: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Tile by tile: rows of scaled, keys as they are computed with, and s of the two in one buffer that the caller may
    overwrite. Keys outside, so that stored halves are widened once.
    """
    height, width = CPU_TILE if scaled.device.type == "cpu" else ACCELERATOR_TILE
    buffer = scaled.new_empty(min(height, len(scaled)) * min(width, len(keys)))
    for tile in keys.split(width) if len(keys) else ():
        tile = tile.to(scaled.dtype)
        for start in range(0, len(scaled), height):
            rows = slice(start, start + height)
            left = scaled[rows]
            s = buffer[: len(left) * len(tile)].view(len(left), len(tile))
            torch.mm(left, tile.T, out=s)
            yield rows, tile, s
