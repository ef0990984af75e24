"""The tiles of NT-Xent: never a matrix of all similarities, and nothing sent between ranks in the backward."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from methods import across

LARGEST_EXPONENT = 40.0  # exp(+-40), and its sum over any batch, are far inside fp32: no maximum has to be taken out
CPU_TILE = (256, 256)  # rows x columns: two such fp32 buffers stay in a core's level-2 cache
ACCELERATOR_TILE = (2048, 8192)


@dataclass(frozen=True)
class Tile:
    rows: slice  # of this rank's 2n rows
    columns: slice  # of the M rows of all ranks
    mirrored: bool  # stands for its transpose, too


class NTXent(Function):
    """z (2n, D): this rank's unit rows, first views then second views; temperature: number or 0-d tensor ->
    the mean of the losses of its rows as anchors.

    L_i = -log( e^s_ip / (e^s_ip + sum_k e^s_ik) ) = softplus(logsumexp_k s_ik - s_ip), with s = z z^T / temperature, p
    the other view of i, k its negatives on all ranks. The sum leaves the positive out, to keep a small loss's digits.

    Similarity is symmetric, so a rank that knows every row's log-sum-exp has the whole gradient of its rows, as anchors
    and as other anchors' negatives. With P_ik = e^(s_ik - lse_i), lse_i over the positive too, and a_i = sigmoid(...) =
    1 - P_ip, the gradient of the sum of all M losses is

        dz_i = 1/temperature * ( sum_k (P_ik + P_ki) z_k - (a_i + a_p) z_p ).

    It presumes that every rank weighs its mean alike, as an average over ranks does.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float | Tensor) -> Tensor:
        every = across.gather(z)  # (M, D)
        scaled = z / temperature
        plain = _plain(temperature)
        sums = z.new_full((len(z),), 0.0 if plain else -torch.inf)  # over negatives: of e^s, or its logarithm
        for tile, s in _similarities(scaled, every):
            if plain:
                s.exp_()
                sums[tile.rows] += s.sum(1)
                if tile.mirrored:
                    sums[tile.columns] += s.sum(0)
            else:
                sums[tile.rows] = torch.logaddexp(sums[tile.rows], s.logsumexp(1))
                if tile.mirrored:
                    sums[tile.columns] = torch.logaddexp(sums[tile.columns], s.logsumexp(0))
        negatives = sums.log_() if plain else sums
        positive = (scaled * _other_view(z)).sum(1)
        lse = across.gather(torch.logaddexp(negatives, positive))  # (M,)
        margin = negatives - positive
        ctx.save_for_backward(z, every, lse, margin.sigmoid(), torch.as_tensor(temperature, dtype=z.dtype))
        ctx.plain = plain
        return -F.logsigmoid(-margin).mean()  # softplus, but torch's is linear beyond 20

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        z, every, lse, a, temperature = ctx.saved_tensors
        with torch.autocast(z.device.type, enabled=False):
            dz = -(a + _other_view(a))[:, None] * _other_view(z)
            own = lse.unflatten(0, (across.size(), -1))[across.rank()]
            scaled = z / temperature
            buffer = _buffer(z, every)
            for tile, s in _similarities(scaled, every):
                i, j = own[tile.rows, None], lse[None, tile.columns]
                other = buffer[: s.numel()].view_as(s)
                if ctx.plain:
                    torch.add(torch.exp(-i), torch.exp(-j), out=other)
                    s.exp_().mul_(other)
                else:
                    torch.sub(s, i, out=other).exp_()
                    s.sub_(j).exp_().add_(other)
                dz[tile.rows].addmm_(s, every[tile.columns])
                if tile.mirrored:
                    dz[tile.columns].addmm_(s.T, z[tile.rows])
            dz *= grads[0] / (len(z) * temperature)
            # The loss depends on z z^T / temperature alone: z grown by 1 + e is the temperature shrunk by 1 - 2e.
            dt = -(z * dz).sum() / (2 * temperature) if ctx.needs_input_grad[1] else None
        return dz, dt


def _plain(temperature: float | Tensor) -> bool:
    """A learnable temperature may grow small, and reading it would make the host wait: it takes the careful way."""
    return not isinstance(temperature, Tensor) and 1 / temperature <= LARGEST_EXPONENT


def _other_view(x: Tensor) -> Tensor:
    """(2n, ...) -> row i has what stood in the row of the same image's other view."""
    return x.roll(len(x) // 2, 0)


def _tile_sides(z: Tensor) -> tuple[int, int]:
    return CPU_TILE if z.device.type == "cpu" else ACCELERATOR_TILE


def _buffer(z: Tensor, every: Tensor) -> Tensor:
    rows, columns = _tile_sides(z)
    return z.new_empty(min(rows, len(z)) * min(columns, len(every)))


def _slices(start: int, stop: int, side: int) -> Iterator[slice]:
    for i in range(start, stop, side):
        yield slice(i, min(i + side, stop))


def _tiles(rows: int, columns: int, sides: tuple[int, int]) -> Iterator[Tile]:
    """No tile has rows of both views. Where this rank has all rows, only tiles on and above the diagonal."""
    for half in (0, rows // 2):
        for i in _slices(half, half + rows // 2, sides[0]):
            if rows < columns:
                yield from (Tile(i, j, False) for j in _slices(0, columns, sides[1]))
            else:
                yield from (Tile(i, j, False) for j in _slices(i.start, i.stop, sides[1]))
                yield from (Tile(i, j, True) for j in _slices(i.stop, columns, sides[1]))


def _similarities(scaled: Tensor, every: Tensor) -> Iterator[tuple[Tile, Tensor]]:
    """Tile by tile, in one buffer that the caller may overwrite: s of its rows and columns, -inf at an anchor itself
    and at its positive.
    """
    rows, half, first = len(scaled), len(scaled) // 2, across.rank() * len(scaled)
    buffer = _buffer(scaled, every)
    for tile in _tiles(rows, len(every), _tile_sides(scaled)):
        left, right = scaled[tile.rows], every[tile.columns]
        s = buffer[: len(left) * len(right)].view(len(left), len(right))
        torch.mm(left, right.T, out=s)
        itself = first + tile.rows.start - tile.columns.start
        positive = itself + (half if tile.rows.start < half else -half)
        for diagonal in (itself, positive):
            if -len(left) < diagonal < len(right):
                s.diagonal(diagonal).fill_(-torch.inf)
        yield tile, s
