"""The tiles of CLIP's loss: one similarity for both directions, never a matrix of all of them."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from kilobatch.methods import collectives as across
from kilobatch.methods.losses.nt_xent import CPU_TILE
from kilobatch.methods.options import Operands
from kilobatch.methods.tiles.torch_ops import (
    add_product_,
    as_operand,
    buffer,
    exp_and_sum_,
    exp_and_weigh_,
    fused,
    product_,
    sides,
    summed_in,
)


class CLIP(Function):
    """u (2n, D): this rank's unit rows over the root of the temperature, those of one tower and then of the other;
    bounded, operands: as NTXent's -> the mean of the losses of its 2n rows as anchors.

    With s_ij = u_i v_j, i a row of the first tower and j one of the second, on all ranks, N each, the anchor i has
    the loss L_i = softplus(logsumexp_{j != i} s_ij - s_ii), and j likewise over i: the sums leave the positive out, to
    keep a small loss's digits. R_i and C_j being the log-sum-exps with it, a_i = 1 - e^(s_ii - R_i), b_j = 1 - e^(s_jj
    - C_j) and W_ij = e^(s_ij - R_i) + e^(s_ij - C_j), the gradient of the sum of all 2N losses is

        du_i = sum_{j != i} W_ij v_j - (a_i + b_i) v_i,    dv_j = sum_{i != j} W_ij u_i - (a_j + b_j) u_j.

    So a tile of s gives its part of both directions' sums, and a tile of W its part of both towers' gradients. A rank
    makes the tiles of its own i with all j: n N products of rows in the forward, where its own i with all j and all i
    with its own j would be nearly 2 n N, and three times as many in the backward, against four times 2 n N. It takes
    the second tower's rows from all ranks, and returns what it found for each: sums in the forward, gradients in the
    backward. The bytes are the same, for the other way gathers both towers.

    It presumes that every rank weighs its mean alike, as an average over ranks does.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, bounded: bool, operands: Operands = "fp32") -> Tensor:
        ctx.bounded, ctx.operands, ctx.fused = bounded, operands, fused("CLIP's loss", u, operands)
        own, second = as_operand(u, operands, ctx.fused).tensor_split(2)
        every, first = across.gather(second), across.rank() * len(own)  # (N, D)
        if ctx.fused:
            from kilobatch.methods.losses.kernels import clip as kernels

            rows, columns = kernels.sums(own, every, first, bounded, operands)
        else:
            rows, columns = _sums(own, every, first, bounded)
        negatives = torch.cat([rows.log_() if bounded else rows, _own_columns(columns, bounded)])  # (2n,)
        positive = (u[: len(own)] * u[len(own) :]).sum(1).repeat(2)
        lse, second_lse = torch.logaddexp(negatives, positive).tensor_split(2)
        margin = negatives - positive
        ctx.save_for_backward(u, every, lse, across.gather(second_lse), margin.sigmoid())
        return -F.logsigmoid(-margin).mean()  # softplus, but torch's is linear beyond 20

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, every, lse, every_lse, a = ctx.saved_tensors
        n, first = len(lse), across.rank() * len(lse)
        with torch.autocast(u.device.type, enabled=False):
            own = as_operand(u[:n], ctx.operands, ctx.fused)
            du = u.roll(n, 0).mul_(-(a + a.roll(n))[:, None])
            of_every = du[n:] if across.size() == 1 else du.new_zeros(len(every), du.shape[1])
            if ctx.fused:
                from kilobatch.methods.losses.kernels import clip as kernels

                du[:n] += kernels.gradient(own, every, first, lse, every_lse, ctx.bounded, ctx.operands)
                of_every += kernels.gradient(every, own, -first, every_lse, lse, ctx.bounded, ctx.operands)
            else:
                _attract_(du[:n], of_every, own, every, first, lse, every_lse, ctx.bounded)
            if across.size() > 1:
                du[n:] += across.scatter_sum(of_every)
            return du.mul_(grads[0] / len(u)), None, None


def _own_columns(found: Tensor, bounded: bool) -> Tensor:
    """found (N,): as _sums', of this rank's rows, for the columns of all ranks -> (n,): the log-sum-exp over the rows
    of all ranks, for its own columns."""
    if bounded:
        return across.scatter_sum(found).log()
    highest = across.all_max(found)
    own = highest.unflatten(0, (across.size(), -1))[across.rank()]
    return across.scatter_sum((found - highest).exp_()).log() + own


def _sums(own: Tensor, every: Tensor, first: int, bounded: bool) -> tuple[Tensor, Tensor]:
    """own (n, D), whose positives stand from row `first` on in every (N, D) -> (n,) and (N,): for each row of either,
    the sum of e^s over its negatives in the other; its logarithm where not bounded."""
    begin, kind = 0.0 if bounded else -torch.inf, summed_in(own)
    rows, columns = (own.new_full((len(x),), begin, dtype=kind) for x in (own, every))
    for i, j, s in _similarities(own, every, first):
        if bounded:
            exp_and_sum_(s, rows[i], columns[j])
        else:
            rows[i] = torch.logaddexp(rows[i], s.logsumexp(1))
            columns[j] = torch.logaddexp(columns[j], s.logsumexp(0))
    return rows, columns


def _attract_(
    du: Tensor, dv: Tensor, own: Tensor, every: Tensor, first: int, lse: Tensor, every_lse: Tensor, bounded: bool
) -> None:
    """Adds the sums over W, of negatives, to du (n, D) and dv (N, D); lse (n,) and every_lse (N,): R and C."""
    of_rows, of_columns = (-lse).exp_(), (-every_lse).exp_()
    for i, j, s in _similarities(own, every, first):
        if bounded:
            exp_and_weigh_(s, of_rows[i], of_columns[j])
        else:
            by_column = (s - every_lse[j]).exp_()
            s.sub_(lse[i, None]).exp_().add_(by_column)
        w = s.to(own.dtype)
        add_product_(du[i], w, every[j])
        add_product_(dv[j], w.T, own[i])


def _similarities(own: Tensor, every: Tensor, first: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tile by tile, in one buffer that the caller may overwrite: s of its rows and columns, -inf at positives."""
    height, width = sides(own, CPU_TILE)
    memory = buffer(own, every, (height, width))
    for start in range(0, len(own), height):
        for column in range(0, len(every), width):
            i, j = slice(start, start + height), slice(column, column + width)
            left, right = own[i], every[j]
            s = memory[: len(left) * len(right)].view(len(left), len(right))
            product_(left, right.T, s)
            diagonal = first + start - column
            if -len(left) < diagonal < len(right):
                s.diagonal(diagonal).fill_(-torch.inf)
            yield i, j, s
