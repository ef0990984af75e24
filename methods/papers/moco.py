"""MoCo: He et al. 2020, arxiv.org/abs/1911.05722; v2: Chen et al. 2020, arxiv.org/abs/2003.04297.

Authors' code: github.com/facebookresearch/moco.
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
from kilobatch.methods.networks.options import WHOLE, Shuffled, refuse_global
from kilobatch.methods.networks.shuffle_bn import Shuffle
from kilobatch.methods.options import Operands

QUEUE = QueueOptions()  # 65,536 keys


class MoCo(Method):
    """A query finds the key of the same image among the keys of a queue: algorithm 1.

    v1: head linear, temperature 0.07; v2: head mlp, temperature 0.2. The first view is the query's, the second the
    key's; symmetric: each view once the one and once the other (the authors' CIFAR-10 notebook), the loss their mean.
    shuffle: shuffled BN, for encoder.norm local; a norm over the global batch gives the less away the larger that is.
    operands: of the products with the queue's keys, whose sums are fp32.
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
        shuffle: Shuffled = False,
        symmetric: bool = False,
        operands: Operands = "fp32",
    ) -> None:
        super().__init__()
        refuse_global(shuffle, encoder.norm)
        self.encoder, self.temperature, self.momentum, self.symmetric = encoder, temperature, momentum, symmetric
        self.operands: Operands = operands
        width = encoder.features
        hidden = [nn.Linear(width, width), nn.ReLU(inplace=True)] if head == "mlp" else []
        self.head = nn.Sequential(*hidden, nn.Linear(width, dim))
        self.momentum_encoder = MomentumEncoder(self.online())
        self.queue = Queue(queue, dim)
        self.shuffle = Shuffle() if shuffle else None
        if shuffle:
            self.whole_batch = WHOLE

    def online(self) -> nn.Module:
        return nn.Sequential(self.encoder, self.head)

    def embed(self, views: Tensor) -> Tensors:
        of = views.unbind(1) if self.symmetric else views.unbind(1)[:1]
        return {"q": torch.stack([unit(self.head(self.encoder(view))) for view in of], 1)}  # (N, 1 or 2, D)

    def target(self, views: Tensor) -> Tensors:
        of = views.flip(1).unbind(1) if self.symmetric else views.unbind(1)[1:]
        return {"k": torch.stack([unit(self.key(view)) for view in of], 1)}  # k[:, i] is the key of q[:, i]

    def key(self, view: Tensor) -> Tensor:
        return self.shuffle(self.momentum_encoder, view) if self.shuffle else self.momentum_encoder(view)

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        pairs = zip(z["q"].unbind(1), t["k"].unbind(1), strict=True)
        return torch.stack(
            [info_nce(q, k, self.queue, self.temperature, operands=self.operands) for q, k in pairs]
        ).mean()

    def update(self, z: Tensors, t: Tensors, batch: Batch, progress: float) -> None:
        self.momentum_encoder.follow(self.online(), self.momentum)
        self.queue.push(t["k"].transpose(0, 1).flatten(0, 1))
        if self.shuffle:
            self.shuffle.advance()

    def measured(self, z: Tensors, t: Tensors) -> Tensor:
        return torch.cat([z["q"], t["k"]], 1)
