"""The tiles of NT-Xent: at most KEPT bytes of all similarities, and nothing sent between ranks in the backward."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from kilobatch.methods import collectives as across
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
KEPT = 2**25  # bytes of tiles that the forward leaves to the backward, which makes the others anew


@dataclass(frozen=True)
class Tile:
    rows: slice  # of this rank's 2n rows
    columns: slice  # of the M rows of all ranks
    mirrored: bool  # stands for its transpose, too

    @property
    def elements(self) -> int:
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)

    def of(self, memory: Tensor) -> Tensor:
        """As many numbers of flat memory as the tile has, in its shape."""
        return memory[: self.elements].view(self.rows.stop - self.rows.start, -1)


class NTXent(Function):
    """u (2n, D): this rank's unit rows over the root of the temperature, first views then second views; bounded: no
    similarity is beyond methods.options.LARGEST_EXPONENT -> the mean of the losses of its rows as anchors.

    L_i = -log( e^s_ip / (e^s_ip + sum_k e^s_ik) ) = softplus(logsumexp_k s_ik - s_ip), with s = u u^T, p the other view
    of i, k its negatives on all ranks. The sum leaves the positive out, to keep a small loss's digits.

    Similarity is symmetric, so a rank that knows every row's log-sum-exp has the whole gradient of its rows, as anchors
    and as other anchors' negatives. With P_ik = e^(s_ik - lse_i), lse_i over the positive too, and a_i = sigmoid(...) =
    1 - P_ip, the gradient of the sum of all M losses is

        du_i = sum_k (P_ik + P_ki) u_k - (a_i + a_p) u_p.

    It presumes that every rank weighs its mean alike, as an average over ranks does.

    operands: what the similarities and their products with rows are computed from (methods/options.py); the
    positives' similarities are of u itself. Where methods.tiles.torch_ops.fused says so both passes are Triton's
    kernels.

    further (2n,): for each row, the log-sum-exp of what stands in its sum besides, such as a memory's keys; then lse_i
    and a_i are with that, and its gradient is the softmax's share of it, e^(further_i - lse_i).
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, bounded: bool, operands: Operands = "fp32", further: Tensor | None = None
    ) -> Tensor:
        ctx.bounded, ctx.operands, ctx.fused = bounded, operands, fused("NT-Xent", u, operands)
        own = as_operand(u, operands, ctx.fused)
        every = across.gather(own)  # (M, D)
        if ctx.fused:
            from kilobatch.methods.losses.kernels import nt_xent as kernels

            negatives, kept = kernels.negatives(own, every, across.rank() * len(u), bounded, operands), []
        else:
            negatives, kept = _negatives(own, every, bounded)
        if further is not None:
            negatives = torch.logaddexp(negatives, further)
        first, second = u.tensor_split(2)
        positive = (first * second).sum(1).repeat(2)  # (2n,)
        lse = across.gather(torch.logaddexp(negatives, positive))  # (M,)
        margin = negatives - positive
        ctx.save_for_backward(u, every, lse, margin.sigmoid(), further, *kept)
        return -F.logsigmoid(-margin).mean()  # softplus, but torch's is linear beyond 20

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, every, lse, a, further, *kept = ctx.saved_tensors
        own, minus, each = _own(every), a + _other_view(a), grads[0] / len(u)
        with torch.autocast(u.device.type, enabled=False):
            if ctx.fused:
                from kilobatch.methods.losses.kernels import nt_xent as kernels

                first = across.rank() * len(u)
                du = kernels.gradient(u, own, every, first, lse, minus, each, ctx.bounded, ctx.operands)
            else:
                du = _other_view(u).mul_(-minus[:, None])
                _attract_(du, own, every, lse, ctx.bounded, kept)
                du.mul_(each)
            return du, None, None, None if further is None else (further - _own(lse)).exp_().mul_(each)


def _negatives(own: Tensor, every: Tensor, bounded: bool) -> tuple[Tensor, list[Tensor]]:
    """own (2n, D), every (M, D) -> (2n,): the log-sum-exp of each row's similarities with its negatives; and the first
    tiles, of exponentials where bounded, of similarities where not.
    """
    kind, kept, room = summed_in(own), [], KEPT
    sums = own.new_full((len(own),), 0.0 if bounded else -torch.inf, dtype=kind)  # of e^s, or its logarithm
    memory = buffer(own, every, sides(own, CPU_TILE))
    for tile in _tiles(len(own), len(every), sides(own, CPU_TILE)):
        room -= tile.elements * kind.itemsize
        s = tile.of(own.new_empty(tile.elements, dtype=kind) if room >= 0 else memory)
        kept += [s] if room >= 0 else []
        _similarities_(tile, own, every, s)
        if bounded:
            exp_and_sum_(s, sums[tile.rows], sums[tile.columns] if tile.mirrored else None)
        else:
            sums[tile.rows] = torch.logaddexp(sums[tile.rows], s.logsumexp(1))
            if tile.mirrored:
                sums[tile.columns] = torch.logaddexp(sums[tile.columns], s.logsumexp(0))
    return sums.log_() if bounded else sums, kept


def _attract_(du: Tensor, own: Tensor, every: Tensor, lse: Tensor, bounded: bool, kept: list[Tensor]) -> None:
    """Adds sum_k (P_ik + P_ki) u_k over negatives k to du (2n, D)."""
    weights = (-lse).exp_()  # P_ik = e^s_ik weights_i
    memory = buffer(own, every, sides(own, CPU_TILE))
    for i, tile in enumerate(_tiles(len(own), len(every), sides(own, CPU_TILE))):
        s = tile.of(memory)
        if i >= len(kept):
            _similarities_(tile, own, every, s)
        if not bounded:
            s = kept[i] if i < len(kept) else s
            s = (s - _own(lse)[tile.rows, None]).exp_().add_((s - lse[tile.columns]).exp_())
        elif i < len(kept):
            torch.add(_own(weights)[tile.rows, None], weights[tile.columns], out=s).mul_(kept[i])
        else:
            exp_and_weigh_(s, _own(weights)[tile.rows], weights[tile.columns])
        p = s.to(own.dtype)
        add_product_(du[tile.rows], p, every[tile.columns])
        if tile.mirrored:
            add_product_(du[tile.columns], p.T, own[tile.rows])


def _own(every: Tensor) -> Tensor:
    """(M, ...) -> this rank's (2n, ...)."""
    return every.unflatten(0, (across.size(), -1))[across.rank()]


def _other_view(x: Tensor) -> Tensor:
    """(2n, ...) -> row i has what stood in the row of the same image's other view."""
    return x.roll(len(x) // 2, 0)


def _slices(start: int, stop: int, side: int) -> Iterator[slice]:
    for i in range(start, stop, side):
        yield slice(i, min(i + side, stop))


def _tiles(rows: int, columns: int, sides: tuple[int, int]) -> Iterator[Tile]:
    """No tile has rows of both views. Where this rank has all rows, only tiles on and above the diagonal."""
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


def _similarities_(tile: Tile, own: Tensor, every: Tensor, s: Tensor) -> None:
    """s becomes the similarities of the tile's rows and columns, -inf at an anchor itself and at its positive."""
    product_(own[tile.rows], every[tile.columns].T, s)
    half = len(own) // 2
    itself = across.rank() * len(own) + tile.rows.start - tile.columns.start
    positive = itself + (half if tile.rows.start < half else -half)
    for diagonal in (itself, positive):
        if -s.shape[0] < diagonal < s.shape[1]:
            s.diagonal(diagonal).fill_(-torch.inf)
