"""Noise-contrastive estimation against a memory bank: Wu et al. 2018, arxiv.org/abs/1805.01978, section 3.2.

Authors' code: github.com/zhirongw/lemniscate.pytorch, lib/NCEAverage.py and NCECriterion.py.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from kilobatch.data.counter_rng import keys, uniforms
from kilobatch.methods import collectives as across
from kilobatch.methods.memories.memory_bank import Bank

CPU_PAIRS = 1 << 16  # of embeddings and noise rows, at a time
ACCELERATOR_PAIRS = 1 << 20


class NCE(nn.Module):
    """Whether an embedding and a row of the bank belong together, or the row is one of `noise` drawn at random.

    With P(i|v) = e^(v f_i / t) / Z and m noise rows out of n, h = P / (P + m/n) says how likely they belong. The
    loss is -log h for the own row and the sum of -log(1 - h) for noise: with c = log Z + log(m/n),

        L = softplus(c - v f_i / t) + sum over noise j of softplus(v f_j / t - c).

    Z is estimated once, from the first batch, and constant ever after. Noise is a pure function of the step and the
    image, so that it is the same on any number of ranks; the own row may be among it, as with the authors.
    """

    step: Tensor  # 0-dim int64
    log_z: Tensor  # 0-dim; 0 before the first batch

    def __init__(self, noise: int, temperature: float) -> None:
        super().__init__()
        self.noise, self.temperature = noise, temperature
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("log_z", torch.tensor(0.0))

    def forward(self, v: Tensor, index: Tensor, bank: Bank) -> Tensor:
        """v (n, V, D): unit rows, V embeddings of each of the images index (n,), this rank's, the same n on every rank
        -> (V,) the mean losses over n. Each embedding has noise of its own. The gradient goes to v alone.

        Embeddings are sent to the rows, and D + 1 sums of each back: (W - 1) n V (2 D + 1) numbers, and a fetch. The
        first call sets Z, over the global batch. Memory is O(n * V * D * ranks), and a row for each pair at a time.
        """
        across.refuse_unequal(len(v), "images", v.device)
        own = bank.fetch(index).to(v.dtype)[:, None]
        names = keys(0, int(self.step), across.gather(index), v.shape[1])
        with torch.autocast(v.device.type, enabled=False), torch.no_grad():
            every = across.gather(v.detach() / self.temperature).flatten(0, 1)
            pairs = _Pairs(every, names.flatten(), bank, self.noise)
            if self.log_z == 0:
                self.log_z.copy_(self._estimate(v, own, pairs, bank.images))
            c = self.log_z.to(v.dtype) + math.log(self.noise / bank.images)
            sums = across.scatter_sum(pairs.sums(c)).view(*v.shape[:2], -1)
            positive = (v * own).sum(2) / self.temperature  # (n, V)
            losses = sums[..., -1] - F.logsigmoid(positive - c)
            dv = (sums[..., :-1] - (c - positive).sigmoid()[..., None] * own) / self.temperature
        return _Given.apply(v, losses, dv).mean(0)

    def _estimate(self, v: Tensor, own: Tensor, pairs: "_Pairs", images: int) -> Tensor:
        """log of images times the mean of e^(v f / t) over own and noise rows, of the global batch."""
        total = across.all_sum(((v * own).sum(2) / self.temperature).exp().sum() + pairs.total())
        return (total / (len(pairs.every) * (self.noise + 1)) * images).log()

    def advance(self) -> None:
        """The next step has other noise."""
        self.step += 1


class _Pairs:
    """All ranks' embeddings, every (N, D), already divided by the temperature, with those of their noise rows that are
    on this rank. names (N,) int64: what each one's noise is drawn by."""

    def __init__(self, every: Tensor, names: Tensor, bank: Bank, noise: int) -> None:
        self.every, self.names, self.bank, self.noise = every, names, bank, noise

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Some embeddings at a time, b: which; rows (b, p, D), similarities and whether they count (b, p)."""
        draws = torch.arange(self.noise, device=self.names.device)
        most = CPU_PAIRS if self.every.device.type == "cpu" else ACCELERATOR_PAIRS
        height = max(1, most * across.size() // self.noise)  # a rank has one row in W
        for first in range(0, len(self.every), height):
            some = slice(first, first + height)
            index = (uniforms(self.names[some, None], draws) * self.bank.images).long()  # (b, m)
            mine, places = self.bank.mine(index)
            front = mine.to(torch.uint8).argsort(stable=True, dim=1, descending=True)[:, : int(mine.sum(1).max())]
            mine, places = mine.gather(1, front), places.gather(1, front) * mine.gather(1, front)
            rows = self.bank.rows[places].to(self.every.dtype)
            yield some, rows, (rows @ self.every[some, :, None])[..., 0], mine

    def total(self) -> Tensor:
        """The sum of e^similarity over all pairs of this rank."""
        return torch.stack([(s.exp() * mine).sum() for _, _, s, mine in self]).sum()

    def sums(self, c: Tensor) -> Tensor:
        """(N, D + 1): over this rank's noise rows f, the sums of sigmoid(s - c) f and of softplus(s - c)."""
        sums = self.every.new_empty(len(self.every), self.every.shape[1] + 1)
        for some, rows, s, mine in self:
            sums[some, :-1] = (((s - c).sigmoid() * mine)[:, None] @ rows)[:, 0]
            sums[some, -1] = -(F.logsigmoid(c - s) * mine).sum(1)  # softplus, but torch's is linear beyond 20
        return sums


class _Given(Function):
    """v (n, V, D), losses (n, V) and their gradients dv (n, V, D) -> losses, whose backward has these gradients."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, losses: Tensor, dv: Tensor) -> Tensor:
        ctx.save_for_backward(dv)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (dv,) = ctx.saved_tensors
        return grads[0][..., None] * dv, None, None
