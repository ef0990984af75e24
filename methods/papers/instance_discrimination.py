"""Instance discrimination: Wu, Xiong, Yu, Lin, 2018, arxiv.org/abs/1805.01978.

Authors' code: github.com/zhirongw/lemniscate.pytorch. Eq. 2, f_i the row of image i in the memory bank:
P(i|v) = exp(v f_i / tau) / sum over j of exp(v f_j / tau).
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods.losses.contrastive import bank_softmax
from kilobatch.methods.losses.nce import NCE
from kilobatch.methods.memories.memory_bank import MemoryBank
from kilobatch.methods.method import DataFacts, Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import unit


class InstanceDiscrimination(Method):
    """Each image is a class of its own, and its row in a memory bank is the class's weight.

    form: softmax is the exact one over all images (eq. 2); nce is noise-contrastive estimation against `noise` images
    drawn at random (eq. 7): the paper's for ImageNet, which diverged here on digits and photographs. noise: images that
    are drawn for each image by form nce. temperature: tau, which similarities are divided by. momentum: the weight of a
    row's old value when it is updated. proximal: lambda of eq. 9, which keeps an embedding near its row; the authors'
    code has the momentum instead. dim: numbers of an embedding and of a row.
    """

    views: ClassVar[int | None] = 1
    bank: MemoryBank

    def __init__(
        self,
        encoder: Encoder,
        *,
        form: Literal["nce", "softmax"] = "softmax",
        noise: Annotated[int, Field(gt=0)] = 4096,
        temperature: Annotated[float, Field(gt=0)] = 0.07,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        proximal: Annotated[float, Field(ge=0)] = 0.0,
        dim: Annotated[int, Field(gt=0)] = 128,
    ) -> None:
        super().__init__()
        self.encoder, self.temperature, self.momentum, self.proximal = encoder, temperature, momentum, proximal
        self.dim = dim
        self.head = nn.Linear(encoder.features, dim)
        self.nce = NCE(noise, temperature) if form == "nce" else None

    def prepare(self, data: DataFacts) -> None:
        self.bank = MemoryBank(data.images, self.dim)

    def embed(self, batch: Batch) -> Tensors:
        return {"v": unit(self.head(self.encoder(batch.views[0][:, 0])))[:, None]}  # (N, 1, D)

    def contrast(self, v: Tensor, index: Tensor) -> Tensor:
        """The mean losses (V,) against the bank of v (n, V, D), V embeddings of each image."""
        if self.nce:
            return self.nce(v, index, self.bank)
        return torch.stack([bank_softmax(u, index, self.bank, self.temperature) for u in v.unbind(1)])

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        loss = self.contrast(z["v"], batch.index).sum()
        if self.proximal:
            difference = z["v"][:, 0] - self.bank.fetch(batch.index)
            loss = loss + self.proximal * difference.square().sum(1).mean()
        return loss

    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        self.bank.follow(batch.index, z["v"][:, 0], self.momentum)
        if self.nce:
            self.nce.advance()
