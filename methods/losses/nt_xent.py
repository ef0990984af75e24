"""NT-Xent in tiles: no matrix of all similarities, and no communication in the backward."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from kilobatch.methods import collectives
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

CPU_TILE = (512, 256)  # rows x columns: half a megabyte of fp32 stays in a core's level-2 cache
KEPT_BYTES = 2**25  # of tiles that the forward keeps for the backward, which computes the others again


@dataclass(frozen=True)
class Tile:
    rows: slice  # of this rank's 2n rows
    columns: slice  # of the M rows of all ranks
    mirrored: bool  # represents its transpose, too

    @property
    def elements(self) -> int:
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)

    def of(self, scratch: Tensor) -> Tensor:
        """The tile's elements in flat memory, in the tile's shape."""
        return scratch[: self.elements].view(self.rows.stop - self.rows.start, -1)


class NTXent(Function):
    """NT-Xent (SimCLR, eq. 1): the mean of the losses of this rank's rows as anchors.

    u (2n, D): this rank's unit rows divided by the root of the temperature, first views, then second views. bounded: no
    similarity exceeds methods.options.LARGEST_EXPONENT.

    L_i = -log( e^s_ip / (e^s_ip + sum_k e^s_ik) ) = softplus(logsumexp_k s_ik - s_ip), with s = u u^T, p the other view
    of i, k its negatives on all ranks. The sum leaves the positive out, which keeps the digits of a small loss.

    Similarity is symmetric, so a rank that knows every row's log-sum-exp has the whole gradient of its rows, as anchors
    and as other anchors' negatives. With P_ik = e^(s_ik - lse_i), lse_i over the positive too, and a_i = sigmoid(...) =
    1 - P_ip, the gradient of the sum of all M losses is

        du_i = sum_k (P_ik + P_ki) u_k - (a_i + a_p) u_p.

    This holds if every rank's mean has the same weight, as in an average over ranks.

    operands: the type in which similarities and their products with rows are computed (methods/options.py); the
    positives' similarities are computed from u itself. Both passes are Triton kernels where
    methods.tiles.torch_ops.fused is true.

    extra_lse (2n,): for each row, the log-sum-exp of further terms of its sum, such as the keys of a queue; lse_i and
    a_i then include it, and its gradient is its share of the softmax, e^(extra_lse_i - lse_i).
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, bounded: bool, operands: Operands = "fp32", extra_lse: Tensor | None = None
    ) -> Tensor:
        ctx.bounded, ctx.operands, ctx.fused = bounded, operands, fused("NT-Xent", u, operands)
        own = as_operand(u, operands, ctx.fused)
        all_rows = collectives.gather(own)  # (M, D)
        if ctx.fused:
            from kilobatch.methods.losses.kernels import nt_xent

            negatives, kept = nt_xent.negatives(own, all_rows, collectives.rank() * len(u), bounded, operands), []
        else:
            negatives, kept = _negatives(own, all_rows, bounded)
        if extra_lse is not None:
            negatives = torch.logaddexp(negatives, extra_lse)
        first, second = u.tensor_split(2)
        positive = (first * second).sum(1).repeat(2)  # (2n,)
        lse = collectives.gather(torch.logaddexp(negatives, positive))  # (M,)
        margin = negatives - positive
        ctx.save_for_backward(u, all_rows, lse, margin.sigmoid(), extra_lse, *kept)
        return -F.logsigmoid(-margin).mean()  # softplus, but torch's is linear beyond 20

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, all_rows, lse, a, extra_lse, *kept = ctx.saved_tensors
        own, positive_weights, scale = _own_rows(all_rows), a + _other_view(a), grads[0] / len(u)
        with torch.autocast(u.device.type, enabled=False):
            if ctx.fused:
                from kilobatch.methods.losses.kernels import nt_xent

                offset = collectives.rank() * len(u)
                du = nt_xent.gradient(u, own, all_rows, offset, lse, positive_weights, scale, ctx.bounded, ctx.operands)
            else:
                du = _other_view(u).mul_(-positive_weights[:, None])
                _add_negatives_gradient_(du, own, all_rows, lse, ctx.bounded, kept)
                du.mul_(scale)
            return du, None, None, None if extra_lse is None else (extra_lse - _own_rows(lse)).exp_().mul_(scale)


def _negatives(own: Tensor, all_rows: Tensor, bounded: bool) -> tuple[Tensor, list[Tensor]]:
    """The log-sum-exp of each row's similarities with its negatives: own (2n, D), all_rows (M, D) -> (2n,); and the
    tiles that are kept, the first ones: of exponentials if bounded, else of similarities.
    """
    dtype, kept, bytes_left = summed_in(own), [], KEPT_BYTES
    sums = own.new_full((len(own),), 0.0 if bounded else -torch.inf, dtype=dtype)  # of e^s, or its logarithm
    scratch = buffer(own, all_rows, sides(own, CPU_TILE))
    for tile in _tiles(len(own), len(all_rows), sides(own, CPU_TILE)):
        bytes_left -= tile.elements * dtype.itemsize
        s = tile.of(own.new_empty(tile.elements, dtype=dtype) if bytes_left >= 0 else scratch)
        kept += [s] if bytes_left >= 0 else []
        _similarities_(tile, own, all_rows, s)
        if bounded:
            exp_and_sum_(s, sums[tile.rows], sums[tile.columns] if tile.mirrored else None)
        else:
            sums[tile.rows] = torch.logaddexp(sums[tile.rows], s.logsumexp(1))
            if tile.mirrored:
                sums[tile.columns] = torch.logaddexp(sums[tile.columns], s.logsumexp(0))
    return sums.log_() if bounded else sums, kept


def _add_negatives_gradient_(
    du: Tensor, own: Tensor, all_rows: Tensor, lse: Tensor, bounded: bool, kept: list[Tensor]
) -> None:
    """Adds the sum of (P_ik + P_ki) u_k over negatives k to du (2n, D)."""
    weights = (-lse).exp_()  # P_ik = e^s_ik weights_i
    scratch = buffer(own, all_rows, sides(own, CPU_TILE))
    for i, tile in enumerate(_tiles(len(own), len(all_rows), sides(own, CPU_TILE))):
        s = tile.of(scratch)
        if i >= len(kept):
            _similarities_(tile, own, all_rows, s)
        if not bounded:
            s = kept[i] if i < len(kept) else s
            s = (s - _own_rows(lse)[tile.rows, None]).exp_().add_((s - lse[tile.columns]).exp_())
        elif i < len(kept):
            torch.add(_own_rows(weights)[tile.rows, None], weights[tile.columns], out=s).mul_(kept[i])
        else:
            exp_and_weigh_(s, _own_rows(weights)[tile.rows], weights[tile.columns])
        p = s.to(own.dtype)
        add_product_(du[tile.rows], p, all_rows[tile.columns])
        if tile.mirrored:
            add_product_(du[tile.columns], p.T, own[tile.rows])


def _own_rows(all_rows: Tensor) -> Tensor:
    """Rows of all ranks (M, ...) -> this rank's (2n, ...)."""
    return all_rows.unflatten(0, (collectives.world_size(), -1))[collectives.rank()]


def _other_view(x: Tensor) -> Tensor:
    """(2n, ...) -> in row i, the row of the same image's other view."""
    return x.roll(len(x) // 2, 0)


def _slices(start: int, stop: int, side: int) -> Iterator[slice]:
    for i in range(start, stop, side):
        yield slice(i, min(i + side, stop))


def _tiles(rows: int, columns: int, sides: tuple[int, int]) -> Iterator[Tile]:
    """The tiles of a (rows, columns) matrix, none with rows of both views. If this rank has all rows, only those on and
    above the diagonal."""
    for half in (0, rows // 2):
        for i in _slices(half, half + rows // 2, sides[0]):
            if rows < columns:
                yield from (Tile(i, j, False) for j in _slices(0, columns, sides[1]))
                continue
            for j in _slices(i.start, i.stop, sides[1]):
                if j.start > i.start:
                    yield Tile(slice(i.start, j.start), j, True)
                yield Tile(j, j, False)
            yield from (Tile(i, j, True) for j in _slices(i.stop, columns, sides[1]))


def _similarities_(tile: Tile, own: Tensor, all_rows: Tensor, s: Tensor) -> None:
    """Writes the tile's similarities to s, -inf at an anchor itself and at its positive."""
    product_(own[tile.rows], all_rows[tile.columns].T, s)
    half = len(own) // 2
    self_diagonal = collectives.rank() * len(own) + tile.rows.start - tile.columns.start
    positive = self_diagonal + (half if tile.rows.start < half else -half)
    for diagonal in (self_diagonal, positive):
        if -s.shape[0] < diagonal < s.shape[1]:
            s.diagonal(diagonal).fill_(-torch.inf)
