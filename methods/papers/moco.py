"""MoCo: He et al. 2020, arxiv.org/abs/1911.05722; v2: Chen et al. 2020, arxiv.org/abs/2003.04297.

Authors' code: github.com/facebookresearch/moco. Eq. 1, k+ the key of query q and k_i all keys, k+ and the queue's:
L_q = -log( exp(q k+ / tau) / sum over i of exp(q k_i / tau) ). Eq. 2: theta_k <- m theta_k + (1 - m) theta_q.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods.losses.contrastive import info_nce
from kilobatch.methods.memories.momentum_encoder import MomentumEncoder
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import unit
from kilobatch.methods.networks.options import SHUFFLES_WHOLE_BATCH, ShuffleOption, refuse_global_norm
from kilobatch.methods.networks.shuffle_bn import Shuffle
from kilobatch.methods.options import Operands

QUEUE = QueueOptions()  # 65,536 keys


class MoCo(Method):
    """A query finds the key of the same image among the keys of a queue: algorithm 1.

    queue: the keys that a query is compared with. temperature: tau, which similarities are divided by, 0.07 in v1, 0.2
    in v2; momentum: m of the momentum encoder, which makes the keys. head: linear is v1's, mlp v2's. dim: numbers of a
    key. symmetric: besides first views as queries and second ones as keys also the reverse, with the mean of both
    losses, as lightly has it; the authors' CIFAR-10 notebook has their sum. shuffle: shuffled BN (section 3.3), for
    encoder.norm local; statistics over the global batch tell the less about a positive, the larger the batch is.
    operands: the type of products with the queue's keys, whose sums are fp32.
    """

    views: ClassVar[int | None] = 2

    def __init__(
        self,
        encoder: Encoder,
        *,
        queue: QueueOptions = QUEUE,
        temperature: Annotated[float, Field(gt=0)] = 0.2,
        momentum: Annotated[float, Field(ge=0, le=1)] = 0.999,
        head: Literal["linear", "mlp"] = "mlp",
        dim: Annotated[int, Field(gt=0)] = 128,
        shuffle: ShuffleOption = False,
        symmetric: bool = False,
        operands: Operands = "fp32",
    ) -> None:
        super().__init__()
        refuse_global_norm(shuffle, encoder.norm)
        self.encoder, self.temperature, self.momentum, self.symmetric = encoder, temperature, momentum, symmetric
        self.operands: Operands = operands
        width = encoder.features
        hidden = [nn.Linear(width, width), nn.ReLU(inplace=True)] if head == "mlp" else []
        self.head = nn.Sequential(*hidden, nn.Linear(width, dim))
        self.momentum_encoder = MomentumEncoder(self.online())
        self.queue = Queue(queue, dim)
        self.shuffle = Shuffle() if shuffle else None
        if shuffle:
            self.whole_batch = SHUFFLES_WHOLE_BATCH

    def online(self) -> nn.Module:
        return nn.Sequential(self.encoder, self.head)

    def embed(self, batch: Batch) -> Tensors:
        views = batch.views[0]
        queries = views.unbind(1) if self.symmetric else views.unbind(1)[:1]
        return {"q": torch.stack([unit(self.head(self.encoder(x_q))) for x_q in queries], 1)}  # (N, 1 or 2, D)

    def target(self, batch: Batch) -> Tensors:
        views = batch.views[0]
        keys = views.flip(1).unbind(1) if self.symmetric else views.unbind(1)[1:]
        return {"k": torch.stack([unit(self.key(x_k)) for x_k in keys], 1)}  # k[:, i] is the key of q[:, i]

    def key(self, x_k: Tensor) -> Tensor:
        return self.shuffle(self.momentum_encoder, x_k) if self.shuffle else self.momentum_encoder(x_k)

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        pairs = zip(z["q"].unbind(1), t["k"].unbind(1), strict=True)
        return torch.stack(
            [info_nce(q, k, self.queue, self.temperature, operands=self.operands) for q, k in pairs]
        ).mean()

    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        self.momentum_encoder.follow(self.online(), self.momentum)
        self.queue.push(t["k"].transpose(0, 1).flatten(0, 1))
        if self.shuffle:
            self.shuffle.advance()

    def measured(self, z: Tensors, t: Tensors) -> Tensor:
        return torch.cat([z["q"], t["k"]], 1)
