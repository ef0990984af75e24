"""HCSC: Guo et al. 2022, arxiv.org/abs/2202.00455; authors' code: github.com/gyfastas/HCSC.

L = sum over levels l of InfoNCE( q, k, keys kept at l ) + 1/M sum over l of -log softmax_c(q c / phi_c)[own], c the
prototypes of level l that are kept: negatives that are likely to be of the query's own cluster are left out by chance.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.errors import UserError
from kilobatch.methods.clusters.hierarchy import Hierarchy
from kilobatch.methods.losses.selective import selected_keys_nce, selected_prototypes_nce
from kilobatch.methods.memories.momentum_encoder import MomentumEncoder
from kilobatch.methods.memories.numbered_queue import NumberedQueue
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.method import DataFacts, EpochFeatures, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import unit
from kilobatch.methods.networks.options import ShuffleOption
from kilobatch.methods.papers.moco import MoCo

QUEUE = QueueOptions(length=16_384)


class HCSC(MoCo):
    """MoCo with a hierarchy of prototypes, by which negatives are selected: section 3.

    clusters: how many each level has, the lowest first. warmup_epochs: until which the loss is MoCo's; before each
    epoch from then on, the momentum encoder's features of all images are clustered by k-means, and the prototypes of
    each level once more. rounds: of k-means, at most; redos: of k-means, from other rows, of which the best counts.
    temperature: tau of InfoNCE, and the mean of phi.

    The other options are MoCo's.
    """

    hierarchy: Hierarchy

    def __init__(
        self,
        encoder: Encoder,
        *,
        clusters: Annotated[tuple[Annotated[int, Field(gt=1)], ...], Field(min_length=1)] = (3000, 2000, 1000),
        warmup_epochs: Annotated[int, Field(ge=0)] = 20,
        rounds: Annotated[int, Field(ge=1)] = 20,
        redos: Annotated[int, Field(ge=1)] = 5,
        queue: QueueOptions = QUEUE,
        temperature: Annotated[float, Field(ge=0.025)] = 0.2,
        momentum: Annotated[float, Field(ge=0, le=1)] = 0.999,
        head: Literal["linear", "mlp"] = "mlp",
        dim: Annotated[int, Field(gt=0)] = 128,
        shuffle: ShuffleOption = False,
    ) -> None:
        super().__init__(
            encoder, queue=queue, temperature=temperature, momentum=momentum, head=head, dim=dim, shuffle=shuffle
        )
        if list(clusters) != sorted(clusters, reverse=True):
            raise UserError(
                f"method.clusters is {list(clusters)}, but each level clusters the prototypes of the one before; give "
                "numbers that fall"
            )
        self.clusters, self.warmup_epochs, self.rounds, self.redos, self.dim = (
            clusters,
            warmup_epochs,
            rounds,
            redos,
            dim,
        )
        self.loss_changes = warmup_epochs
        self.momentum_encoder = MomentumEncoder(self.online(), own_statistics=True)
        self.queue = NumberedQueue(queue, dim)

    def prepare(self, data: DataFacts) -> None:
        if 1 < data.images < self.clusters[0]:  # 0 or 1: it is only loaded
            raise UserError(
                f"method.clusters has {self.clusters[0]}, more than the {data.images} images of data.train; use fewer"
            )
        self.hierarchy = Hierarchy(data.images, self.clusters, self.dim)

    def before_epoch(self, epoch: int, features: EpochFeatures) -> None:
        if epoch >= self.warmup_epochs:
            index, x = features(lambda images: unit(self.momentum_encoder(images)))
            self.hierarchy.fill(index, x, self.temperature, self.rounds, self.redos, features.go_on)

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        if batch.clock.epoch < self.warmup_epochs:
            return super().loss(z, t, batch)
        q, k = z["q"][:, 0], t["k"][:, 0]
        instance = selected_keys_nce(q, k, self.queue, self.hierarchy, batch, self.temperature)
        return instance + selected_prototypes_nce(q, self.hierarchy, batch)

    @torch.no_grad()
    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        self.momentum_encoder.follow(self.online(), self.momentum)
        self.queue.push_numbered(t["k"][:, 0], batch.keys)
        if self.shuffle:
            self.shuffle.advance()
