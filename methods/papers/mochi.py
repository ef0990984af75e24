"""MoCHi: Kalantidis, Sariyildiz, Pion, Weinzaepfel, Larlus, 2020, arxiv.org/abs/2010.01028.

Synthetic negatives of a query q, from its hardest keys n_i, each scaled to length 1: h = alpha n_i + (1 - alpha) n_j
with alpha from (0, 1), section 4.1; h' = beta q + (1 - beta) n_j with beta from (0, 0.5), section 4.2.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.tensor_rng import keys, uniforms
from kilobatch.methods.losses.contrastive import info_nce
from kilobatch.methods.memories.options import HardCount, QueueOptions, refuse_too_many_hard
from kilobatch.methods.method import Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import unit
from kilobatch.methods.networks.options import ShuffleOption
from kilobatch.methods.papers.moco import MoCo

QUEUE = QueueOptions()  # 65,536 keys


class MoCHi(MoCo):
    """MoCo with synthetic negatives, which are mixed for each query in addition to the queue: section 4.

    hard: keys of the whole queue that are nearest to a query, its hard negatives (N). mixed: pairs of hard
    negatives that give a point h each (s). with_query: hard negatives that give a point h' each with the query, nearer
    to the key (s'). start: the share of the training before which nothing is mixed.

    Synthetic negatives have no gradient. The keys and their weights are a pure function of the step and the image. The
    other options are MoCo's, except that there is no `operands`: products
    are fp32.
    """

    step: Tensor  # 0-dim int64
    progress: Tensor  # 0-dim: the share of the training that is done

    def __init__(
        self,
        encoder: Encoder,
        *,
        hard: HardCount = 1024,
        mixed: Annotated[int, Field(ge=0)] = 1024,
        with_query: Annotated[int, Field(ge=0)] = 128,
        start: Annotated[float, Field(ge=0, le=1)] = 0.05,
        queue: QueueOptions = QUEUE,
        temperature: Annotated[float, Field(gt=0)] = 0.2,
        momentum: Annotated[float, Field(ge=0, le=1)] = 0.999,
        head: Literal["linear", "mlp"] = "mlp",
        dim: Annotated[int, Field(gt=0)] = 128,
        shuffle: ShuffleOption = False,
        symmetric: bool = False,
    ) -> None:
        refuse_too_many_hard(hard, queue)
        super().__init__(
            encoder,
            queue=queue,
            temperature=temperature,
            momentum=momentum,
            head=head,
            dim=dim,
            shuffle=shuffle,
            symmetric=symmetric,
        )
        self.hard, self.mixed, self.with_query, self.start = hard, mixed, with_query, start
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("progress", torch.tensor(0.0))

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        if self.progress < self.start:
            return super().loss(z, t, batch)
        random_keys = keys(0, int(self.step), batch.index, z["q"].shape[1])
        losses = [
            info_nce(q, k, self.queue, self.temperature, self.synthetic(q.detach(), random_keys[:, i]))
            for i, (q, k) in enumerate(zip(z["q"].unbind(1), t["k"].unbind(1), strict=True))
        ]
        return torch.stack(losses).mean()

    def synthetic(self, q: Tensor, random_keys: Tensor) -> Tensor:
        """The synthetic negatives (n, s + s', D) of q (n, D), whose random numbers come from random_keys (n,)."""
        hardest = self.queue.hardest(q, self.hard)  # (n, N, D)
        count = hardest.shape[1]
        if not count:  # a queue that started empty
            return hardest
        sizes = self.mixed, self.mixed, self.mixed, self.with_query, self.with_query
        uniform = uniforms(random_keys[:, None], torch.arange(sum(sizes), device=q.device))  # in [0, 1)
        u_i, u_j, alpha, u_query, beta = uniform.split(sizes, 1)
        i = (u_i * count).long()
        j = (i + 1 + (u_j * (count - 1)).long()) % count  # not i
        n_i, n_j, n_query = (_rows(hardest, index) for index in (i, j, (u_query * count).long()))
        alpha, beta = alpha[..., None].to(q.dtype), beta[..., None].to(q.dtype) / 2
        h = alpha * n_i + (1 - alpha) * n_j
        h_prime = beta * q[:, None] + (1 - beta) * n_query
        return unit(torch.cat([h, h_prime], 1))

    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        super().update(z, t, batch)
        self.progress.fill_(batch.clock.after)
        self.step += 1


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (n, N, D), index (n, s) -> (n, s, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
