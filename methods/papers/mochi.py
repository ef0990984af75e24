"""MoCHi: Kalantidis, Sariyildiz, Pion, Weinzaepfel, Larlus, 2020, arxiv.org/abs/2010.01028."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.counter_rng import keys, uniforms
from kilobatch.methods.losses.contrastive import info_nce
from kilobatch.methods.memories.options import Hard, QueueOptions, refuse_harder
from kilobatch.methods.method import Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import unit
from kilobatch.methods.networks.options import Shuffled
from kilobatch.methods.papers.moco import MoCo

QUEUE = QueueOptions()  # 65,536 keys


class MoCHi(MoCo):
    """MoCo whose queries meet, beside the queue, negatives that are mixed for each of them: section 4.

    Of the `hard` keys of the whole queue nearest to a query (N), `mixed` pairs make a point between the two (s), and
    `with_query` keys one between the key and the query, nearer to the key (s'). None carries gradient. Which keys, and
    how they are mixed, is a pure function of the step and the image. start: the share of the training before which
    nothing is mixed. The other options are MoCo's.
    """

    step: Tensor  # 0-dim int64
    progress: Tensor  # 0-dim: the share of the training that is done

    def __init__(
        self,
        encoder: Encoder,
        *,
        hard: Hard = 1024,
        mixed: Annotated[int, Field(ge=0)] = 1024,
        with_query: Annotated[int, Field(ge=0)] = 128,
        start: Annotated[float, Field(ge=0, le=1)] = 0.05,
        queue: QueueOptions = QUEUE,
        temperature: Annotated[float, Field(gt=0)] = 0.2,
        momentum: Annotated[float, Field(ge=0, le=1)] = 0.999,
        head: Literal["linear", "mlp"] = "mlp",
        dim: Annotated[int, Field(gt=0)] = 128,
        shuffle: Shuffled = False,
        symmetric: bool = False,
    ) -> None:
        refuse_harder(hard, queue)
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
        names = keys(0, int(self.step), batch.index, z["q"].shape[1])
        losses = [
            info_nce(q, k, self.queue, self.temperature, self.harder(q.detach(), names[:, i]))
            for i, (q, k) in enumerate(zip(z["q"].unbind(1), t["k"].unbind(1), strict=True))
        ]
        return torch.stack(losses).mean()

    def harder(self, q: Tensor, names: Tensor) -> Tensor:
        """q (n, D), names (n,) that each one's chance is drawn by -> (n, s + s', D): unit negatives, 4.1 and 4.2."""
        hardest = self.queue.hardest(q, self.hard)  # (n, N, D)
        count = hardest.shape[1]
        if not count:  # a queue that began empty
            return hardest
        sizes = self.mixed, self.mixed, self.mixed, self.with_query, self.with_query
        draws = uniforms(names[:, None], torch.arange(sum(sizes), device=q.device))
        i, j, alpha, towards, beta = draws.split(sizes, 1)
        first = (i * count).long()
        second = (first + 1 + (j * (count - 1)).long()) % count  # another one
        a, b, c = (_rows(hardest, which) for which in (first, second, (towards * count).long()))
        alpha, beta = alpha[..., None].to(q.dtype), beta[..., None].to(q.dtype) / 2
        between = alpha * a + (1 - alpha) * b
        nearer = beta * q[:, None] + (1 - beta) * c
        return unit(torch.cat([between, nearer], 1))

    def update(self, z: Tensors, t: Tensors, batch: Batch, progress: float) -> None:
        super().update(z, t, batch, progress)
        self.progress.fill_(progress)
        self.step += 1


def _rows(x: Tensor, which: Tensor) -> Tensor:
    """x (n, N, D), which (n, s) -> (n, s, D)."""
    return x.gather(1, which[..., None].expand(-1, -1, x.shape[2]))
