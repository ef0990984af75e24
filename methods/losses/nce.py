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

from kilobatch.data.tensor_rng import keys, uniforms
from kilobatch.methods import collectives
from kilobatch.methods.memories.memory_bank import MemoryBank

CPU_PAIRS = 1 << 16  # pairs of an embedding and a noise row that are computed at a time
ACCELERATOR_PAIRS = 1 << 20


class NCE(nn.Module):
    """Noise-contrastive estimation: tells an image's row of the bank from `noise` rows drawn at random.

    With P(i|v) = e^(v f_i / t) / Z (eq. 4) and m noise rows out of n, h = P / (P + m/n) is the probability that row i
    is the image's own (eq. 6). The loss is -log h for the own row plus the sum of -log(1 - h) over noise rows (eq. 7):
    with c = log Z + log(m/n),

        L = softplus(c - v f_i / t) + sum over noise j of softplus(v f_j / t - c).

    Z is estimated from the first batch (eq. 8) and constant afterwards. Noise is a pure function of the step and the
    image, so that it is the same on any number of ranks; it may include the own row, as with the authors.
    """

    step: Tensor  # 0-dim int64
    log_z: Tensor  # 0-dim; 0 before the first batch

    def __init__(self, noise: int, temperature: float) -> None:
        super().__init__()
        self.noise, self.temperature = noise, temperature
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("log_z", torch.tensor(0.0))

    def forward(self, v: Tensor, index: Tensor, bank: MemoryBank) -> Tensor:
        """The mean losses over n, (V,). v (n, V, D): unit rows, V embeddings of each of this rank's images index (n,),
        the same n on every rank. Each embedding has noise of its own. v alone gets a gradient.

        A rank sends its embeddings to all ranks, and gets D + 1 sums of each back: (W - 1) n V (2 D + 1) numbers, and a
        fetch. The first call sets Z, over the global batch. Memory is O(n * V * D * ranks), and a row for each of the
        pairs that are computed at a time.
        """
        collectives.refuse_unequal(len(v), "images", v.device)
        own_rows = bank.fetch(index).to(v.dtype)[:, None]
        noise_keys = keys(0, int(self.step), collectives.gather(index), v.shape[1])
        with torch.autocast(v.device.type, enabled=False), torch.no_grad():
            scaled = collectives.gather(v.detach() / self.temperature).flatten(0, 1)
            pairs = _NoisePairs(scaled, noise_keys.flatten(), bank, self.noise)
            if self.log_z == 0:
                self.log_z.copy_(self._estimate(v, own_rows, pairs, bank.images))
            c = self.log_z.to(v.dtype) + math.log(self.noise / bank.images)
            sums = collectives.reduce_scatter(pairs.sums(c)).view(*v.shape[:2], -1)
            positive = (v * own_rows).sum(2) / self.temperature  # (n, V)
            losses = sums[..., -1] - F.logsigmoid(positive - c)
            dv = (sums[..., :-1] - (c - positive).sigmoid()[..., None] * own_rows) / self.temperature
        return _WithGradient.apply(v, losses, dv).mean(0)

    def _estimate(self, v: Tensor, own_rows: Tensor, pairs: "_NoisePairs", images: int) -> Tensor:
        """log Z: images times the mean of e^(v f / t) over the own and noise rows of the global batch."""
        total = collectives.all_reduce_sum(
            ((v * own_rows).sum(2) / self.temperature).exp().sum() + pairs.sum_of_exponentials()
        )
        return (total / (len(pairs.scaled) * (self.noise + 1)) * images).log()

    def advance(self) -> None:
        """Goes on to the next step's noise."""
        self.step += 1


class _NoisePairs:
    """The embeddings of all ranks, paired with those of their noise rows that are on this rank.

    scaled (N, D): the embeddings divided by the temperature; noise_keys (N,) int64: the random keys of their noise.
    """

    def __init__(self, scaled: Tensor, noise_keys: Tensor, bank: MemoryBank, noise: int) -> None:
        self.scaled, self.noise_keys, self.bank, self.noise = scaled, noise_keys, bank, noise

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yields, for b embeddings at a time, their slice, rows (b, p, D), similarities (b, p), and a mask (b, p): True
        where a similarity counts."""
        draws = torch.arange(self.noise, device=self.noise_keys.device)
        pairs_at_once = CPU_PAIRS if self.scaled.device.type == "cpu" else ACCELERATOR_PAIRS
        height = max(1, pairs_at_once * collectives.world_size() // self.noise)  # a rank has one in W rows
        for first in range(0, len(self.scaled), height):
            block = slice(first, first + height)
            index = (uniforms(self.noise_keys[block, None], draws) * self.bank.images).long()  # (b, m)
            is_local, positions = self.bank.locate(index)
            local_first = is_local.to(torch.uint8).argsort(stable=True, dim=1, descending=True)
            columns = local_first[:, : int(is_local.sum(1).max())]
            is_local, positions = is_local.gather(1, columns), positions.gather(1, columns)
            positions = positions * is_local
            rows = self.bank.rows[positions].to(self.scaled.dtype)
            yield block, rows, (rows @ self.scaled[block, :, None])[..., 0], is_local

    def sum_of_exponentials(self) -> Tensor:
        """The sum of e^similarity over all pairs of this rank."""
        return torch.stack([(s.exp() * is_local).sum() for _, _, s, is_local in self]).sum()

    def sums(self, c: Tensor) -> Tensor:
        """The sums of sigmoid(s - c) f and of softplus(s - c) over this rank's noise rows f, (N, D + 1)."""
        sums = self.scaled.new_empty(len(self.scaled), self.scaled.shape[1] + 1)
        for block, rows, s, is_local in self:
            sums[block, :-1] = (((s - c).sigmoid() * is_local)[:, None] @ rows)[:, 0]
            sums[block, -1] = -(F.logsigmoid(c - s) * is_local).sum(1)  # softplus, but torch's is linear beyond 20
        return sums


class _WithGradient(Function):
    """Returns losses (n, V), with dv (n, V, D) as their gradients for v (n, V, D)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, losses: Tensor, dv: Tensor) -> Tensor:
        ctx.save_for_backward(dv)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (dv,) = ctx.saved_tensors
        return grads[0][..., None] * dv, None, None
