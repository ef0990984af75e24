"""PCL: Li, Zhou, Xiong, Hoi 2021, arxiv.org/abs/2005.04966; authors' code: github.com/salesforce/PCL.

Eq. 11, with M clusterings of k_m clusters, c_s the prototype of the query's image in clustering m:
L = InfoNCE - 1/M sum over m of log( exp(q c_s / phi_s) / sum over j of exp(q c_j / phi_j) ).
"""

from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.data.errors import UserError
from kilobatch.methods.clusters.kmeans import kmeans
from kilobatch.methods.clusters.prototypes import Prototypes, gather_assignment
from kilobatch.methods.losses.prototypes import prototype_nce
from kilobatch.methods.memories.momentum_encoder import MomentumEncoder
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.method import DataFacts, EpochFeatures, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import unit
from kilobatch.methods.networks.options import ShuffleOption
from kilobatch.methods.options import Operands
from kilobatch.methods.papers.moco import MoCo

QUEUE = QueueOptions(length=16_384)


class PCL(MoCo):
    """MoCo whose queries also find the prototype of their image's cluster: algorithm 1.

    clusters: how many each clustering has. warmup_epochs: until which the loss is MoCo's; before each epoch from then
    on, the momentum encoder's features of all images are clustered by k-means. rounds: of k-means, at most; redos: of
    k-means, from other rows, of which the best counts. negatives: prototypes of no image of the batch that a query is
    compared with, beside those of the batch; null: all of them. temperature: tau of InfoNCE, and the mean of phi.

    The other options are MoCo's.
    """

    levels: nn.ModuleList

    def __init__(
        self,
        encoder: Encoder,
        *,
        clusters: Annotated[tuple[Annotated[int, Field(gt=1)], ...], Field(min_length=1)] = (25_000, 50_000, 100_000),
        warmup_epochs: Annotated[int, Field(ge=0)] = 20,
        negatives: Annotated[int, Field(ge=1)] | None = 16_384,
        rounds: Annotated[int, Field(ge=1)] = 20,
        redos: Annotated[int, Field(ge=1)] = 5,
        queue: QueueOptions = QUEUE,
        temperature: Annotated[float, Field(gt=0)] = 0.2,
        momentum: Annotated[float, Field(ge=0, le=1)] = 0.999,
        head: Literal["linear", "mlp"] = "mlp",
        dim: Annotated[int, Field(gt=0)] = 128,
        shuffle: ShuffleOption = False,
        operands: Operands = "fp32",
    ) -> None:
        super().__init__(
            encoder,
            queue=queue,
            temperature=temperature,
            momentum=momentum,
            head=head,
            dim=dim,
            shuffle=shuffle,
            operands=operands,
        )
        self.clusters, self.warmup_epochs, self.negatives = clusters, warmup_epochs, negatives
        self.rounds, self.redos, self.dim, self.loss_changes = rounds, redos, dim, warmup_epochs
        self.momentum_encoder = MomentumEncoder(self.online(), own_statistics=True)

    def prepare(self, data: DataFacts) -> None:
        if 1 < data.images < max(self.clusters):  # 0 or 1: it is only loaded
            raise UserError(
                f"method.clusters has {max(self.clusters)}, more than the {data.images} images of data.train; use fewer"
            )
        self.levels = nn.ModuleList(Prototypes(data.images, count, self.dim) for count in self.clusters)

    def before_epoch(self, epoch: int, features: EpochFeatures) -> None:
        if epoch < self.warmup_epochs:
            return
        index, x = features(lambda images: unit(self.momentum_encoder(images)))
        found = [
            kmeans(
                index,
                x,
                count,
                key=level,
                rounds=self.rounds,
                redos=self.redos,
                go_on=partial(features.go_on, f"k-means of {count} clusters"),
            )
            for level, count in enumerate(self.clusters)
        ]
        for prototypes, clusters in zip(self.prototypes(), found, strict=True):
            assignment = gather_assignment(index, clusters, len(prototypes.assignment))
            prototypes.fill(assignment, clusters, self.temperature)

    def prototypes(self) -> list[Prototypes]:
        return [level for level in self.levels if isinstance(level, Prototypes)]

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        instance = super().loss(z, t, batch)
        if batch.clock.epoch < self.warmup_epochs:
            return instance
        q = z["q"][:, 0]
        terms = [
            prototype_nce(q, prototypes, batch, level, self.negatives)
            for level, prototypes in enumerate(self.prototypes())
        ]
        return instance + torch.stack(terms).mean()
