"""CLIP's loss in tiles: each similarity is computed once for both directions, and there is no matrix of all of them."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from kilobatch.methods import collectives
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
    """CLIP's loss: the mean of the losses of this rank's 2n rows as anchors.

    u (2n, D): this rank's unit rows divided by the root of the temperature, first those of one tower, then those of the
    other. bounded, operands: as NTXent's.

    With s_ij = u_i v_j, i a row of the first tower and j one of the second, on all ranks, N each, the anchor i has
    the loss L_i = softplus(logsumexp_{j != i} s_ij - s_ii), and j likewise over i: the sums leave the positive out,
    which keeps the digits of a small loss. With R_i and C_j the log-sum-exps including the positive,
    a_i = 1 - e^(s_ii - R_i), b_j = 1 - e^(s_jj - C_j) and W_ij = e^(s_ij - R_i) + e^(s_ij - C_j), the gradient of the
    sum of all 2N losses is

        du_i = sum_{j != i} W_ij v_j - (a_i + b_i) v_i,    dv_j = sum_{i != j} W_ij u_i - (a_j + b_j) u_j.

    So a tile of s gives its part of both directions' sums, and a tile of W its part of both towers' gradients. A rank
    computes the tiles of its own i with all j: n N products of rows in the forward, where its own i with all j and all
    i with its own j would be nearly 2 n N, and three times as many in the backward, against four times 2 n N. It
    gathers the second tower's rows from all ranks and sends back what it has computed for each: sums in the forward,
    gradients in the backward. The bytes are the same as if both towers were gathered.

    This holds if every rank's mean has the same weight, as in an average over ranks.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, bounded: bool, operands: Operands = "fp32") -> Tensor:
        ctx.bounded, ctx.operands, ctx.fused = bounded, operands, fused("CLIP's loss", u, operands)
        own, second = as_operand(u, operands, ctx.fused).tensor_split(2)
        all_rows, offset = collectives.gather(second), collectives.rank() * len(own)  # (N, D)
        if ctx.fused:
            from kilobatch.methods.losses.kernels import clip

            rows, columns = clip.sums(own, all_rows, offset, bounded, operands)
        else:
            rows, columns = _sums(own, all_rows, offset, bounded)
        negatives = torch.cat([rows.log_() if bounded else rows, _own_columns(columns, bounded)])  # (2n,)
        positive = (u[: len(own)] * u[len(own) :]).sum(1).repeat(2)
        lse, second_lse = torch.logaddexp(negatives, positive).tensor_split(2)
        margin = negatives - positive
        ctx.save_for_backward(u, all_rows, lse, collectives.gather(second_lse), margin.sigmoid())
        return -F.logsigmoid(-margin).mean()  # softplus, but torch's is linear beyond 20

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, all_rows, lse, all_lse, a = ctx.saved_tensors
        n, offset = len(lse), collectives.rank() * len(lse)
        with torch.autocast(u.device.type, enabled=False):
            own = as_operand(u[:n], ctx.operands, ctx.fused)
            du = u.roll(n, 0).mul_(-(a + a.roll(n))[:, None])
            d_all_second = du[n:] if collectives.world_size() == 1 else du.new_zeros(len(all_rows), du.shape[1])
            if ctx.fused:
                from kilobatch.methods.losses.kernels import clip

                du[:n] += clip.gradient(own, all_rows, offset, lse, all_lse, ctx.bounded, ctx.operands)
                d_all_second += clip.gradient(all_rows, own, -offset, all_lse, lse, ctx.bounded, ctx.operands)
            else:
                _add_negatives_gradient_(du[:n], d_all_second, own, all_rows, offset, lse, all_lse, ctx.bounded)
            if collectives.world_size() > 1:
                du[n:] += collectives.reduce_scatter(d_all_second)
            return du.mul_(grads[0] / len(u)), None, None


def _own_columns(partial: Tensor, bounded: bool) -> Tensor:
    """The log-sum-exp over the rows of all ranks for this rank's columns, (n,). partial (N,): as _sums', over this
    rank's rows, for the columns of all ranks."""
    if bounded:
        return collectives.reduce_scatter(partial).log()
    maximum = collectives.all_reduce_max(partial)
    own_maximum = maximum.unflatten(0, (collectives.world_size(), -1))[collectives.rank()]
    return collectives.reduce_scatter((partial - maximum).exp_()).log() + own_maximum


def _sums(own: Tensor, all_rows: Tensor, offset: int, bounded: bool) -> tuple[Tensor, Tensor]:
    """The sum of e^s over the negatives of each row, or its logarithm if not bounded, (n,) of own and (N,) of all_rows.

    own (n, D): rows whose positives are rows `offset` and following of all_rows (N, D).
    """
    initial, dtype = 0.0 if bounded else -torch.inf, summed_in(own)
    rows, columns = (own.new_full((len(x),), initial, dtype=dtype) for x in (own, all_rows))
    for i, j, s in _similarities(own, all_rows, offset):
        if bounded:
            exp_and_sum_(s, rows[i], columns[j])
        else:
            rows[i] = torch.logaddexp(rows[i], s.logsumexp(1))
            columns[j] = torch.logaddexp(columns[j], s.logsumexp(0))
    return rows, columns


def _add_negatives_gradient_(
    du: Tensor, dv: Tensor, own: Tensor, all_rows: Tensor, offset: int, lse: Tensor, all_lse: Tensor, bounded: bool
) -> None:
    """Adds the sums of W_ij v_j and W_ij u_i over negatives to du (n, D), dv (N, D). lse (n,) is R, all_lse (N,) C."""
    row_weights, column_weights = (-lse).exp_(), (-all_lse).exp_()
    for i, j, s in _similarities(own, all_rows, offset):
        if bounded:
            exp_and_weigh_(s, row_weights[i], column_weights[j])
        else:
            column_softmax = (s - all_lse[j]).exp_()
            s.sub_(lse[i, None]).exp_().add_(column_softmax)
        w = s.to(own.dtype)
        add_product_(du[i], w, all_rows[j])
        add_product_(dv[j], w.T, own[i])


def _similarities(own: Tensor, all_rows: Tensor, offset: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields rows, columns and similarities of each tile, -inf at positives, in one buffer that may be overwritten."""
    height, width = sides(own, CPU_TILE)
    scratch = buffer(own, all_rows, (height, width))
    for row_start in range(0, len(own), height):
        for column_start in range(0, len(all_rows), width):
            i, j = slice(row_start, row_start + height), slice(column_start, column_start + width)
            left, right = own[i], all_rows[j]
            s = scratch[: len(left) * len(right)].view(len(left), len(right))
            product_(left, right.T, s)
            diagonal = offset + row_start - column_start
            if -len(left) < diagonal < len(right):
                s.diagonal(diagonal).fill_(-torch.inf)
            yield i, j, s
