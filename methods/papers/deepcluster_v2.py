"""DeepCluster-v2: Caron et al. 2020, arxiv.org/abs/2006.09882, section 5.1; authors' code: github.com/facebookresearch/
swav, main_deepclusterv2.py.

Before each epoch, spherical k-means over the last epoch's own projections; then, with centroids C_h and the cluster
y_h,n of image n under head h, z unit: L = 1/H sum_h mean over n and views v of -log softmax(z_v,n C_h^T / tau)[y_h,n].
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.methods.clusters.kmeans import kmeans, own_share
from kilobatch.methods.memories.memory_bank import MemoryBank
from kilobatch.methods.method import DataFacts, EpochFeatures, Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import SwAVHead, embed_views, unit
from kilobatch.methods.parameter_groups import ParameterGroup

NONE = -100  # the cluster of an image that the last epoch left out: it is in no loss


class DeepClusterV2(Method):
    """All views of an image predict the cluster that it was in at the end of the last epoch.

    temperature: tau, which scores are divided by. prototypes: clusters of each head; head h clusters the projections of
    first views or, where h is odd, of second ones. rounds: of k-means. dim: numbers of a projection; hidden: the width
    of the head's hidden layer.

    The prototypes are the centroids and are not trained. Images that the last epoch left out, with its last incomplete
    batch, count for nothing until they are seen again. Before the first epoch the clusters are of clean images.
    """

    views: ClassVar[int | None] = 2
    further_groups: ClassVar[bool] = True
    prototypes: Tensor  # (sum of the heads' clusters, D) unit rows, head after head
    clusters: Tensor  # (H, images) int32: of each image under each head, or NONE
    seen: Tensor  # (images,) bool: whether this epoch has put the image's projections into the banks
    clustered: Tensor  # 0-dim int64: the epoch that the clusters were made for, which a resume does not make again

    def __init__(
        self,
        encoder: Encoder,
        *,
        temperature: Annotated[float, Field(gt=0)] = 0.1,
        prototypes: Annotated[tuple[Annotated[int, Field(gt=1)], ...], Field(min_length=1)] = (3000, 3000, 3000),
        rounds: Annotated[int, Field(ge=1)] = 10,
        dim: Annotated[int, Field(gt=0)] = 128,
        hidden: Annotated[int, Field(gt=0)] = 2048,
    ) -> None:
        super().__init__()
        self.encoder, self.temperature, self.counts, self.rounds = encoder, temperature, prototypes, rounds
        self.dim = dim
        self.head = SwAVHead(encoder.features, hidden, dim, encoder.norm)

    def groups(self) -> Sequence[ParameterGroup]:
        # LARC adapts the steps of all tensors, biases and norms as well.
        return [ParameterGroup("", adapt=True)]

    def prepare(self, data: DataFacts) -> None:
        if 1 < data.images < max(self.counts):  # 0 or 1: it is only loaded
            raise UserError(f"method.prototypes has {max(self.counts)} clusters for {data.images} images; use fewer")
        self.banks = nn.ModuleList([MemoryBank(data.images, self.dim) for _ in range(2)])
        self.register_buffer("prototypes", torch.zeros(sum(self.counts), self.dim))
        self.register_buffer("clusters", torch.full((len(self.counts), data.images), NONE, dtype=torch.int32))
        self.register_buffer("seen", torch.zeros(data.images, dtype=torch.bool))
        self.register_buffer("clustered", torch.tensor(-1))

    def before_epoch(self, epoch: int, features: EpochFeatures) -> None:
        if epoch == int(self.clustered):
            return
        images, banks = self.last_projections(features)
        seen = self.seen if self.seen.any() else torch.ones_like(self.seen)
        place = seen.cumsum(0)[images] - 1  # among the images that are clustered
        found, centroids = torch.zeros_like(self.clusters), []
        for head, count in enumerate(self.counts):
            of = kmeans(
                place,
                banks[head % 2],
                count,
                key=epoch * len(self.counts) + head,
                rounds=self.rounds,
                spherical=True,
                keep_empty=True,
                go_on=partial(features.go_on, f"clusters of head {head}"),
            )
            found[head, images] = (of.assignment - NONE).int()
            centroids.append(of.centroids)
        self.clusters.copy_(collectives.all_reduce_sum(found) + NONE)
        self.prototypes.copy_(torch.cat(centroids))
        self.seen.zero_()
        self.clustered.fill_(epoch)

    def last_projections(self, features: EpochFeatures) -> tuple[Tensor, list[Tensor]]:
        """This rank's images (n,), and their projections (n, D) of first and of second views."""
        if not self.seen.any():
            images, rows = features(lambda x: unit(self.head(self.encoder(x))))
            return images, [rows, rows]
        own = own_share(len(self.seen), self.seen.device)
        return own[self.seen[own]], [bank.rows[self.seen[own]] for bank in self.both_banks()]

    def both_banks(self) -> list[MemoryBank]:
        return [bank for bank in self.banks if isinstance(bank, MemoryBank)]

    def embed(self, batch: Batch) -> Tensors:
        return {"z": embed_views(self.encoder, self.head, batch.views)}  # (N, V, D), the large views first

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        rows, clusters = unit(z["z"]), self.clusters[:, batch.index].long()  # (n, V, D), (H, n)
        views, total = rows.shape[1], rows.new_zeros(())
        for prototypes, cluster in zip(self.prototypes.to(rows.dtype).split(self.counts), clusters, strict=True):
            scores = (rows @ prototypes.T / self.temperature).flatten(0, 1)  # (n V, K)
            each = cluster.repeat_interleave(views)
            total = total + F.cross_entropy(scores, each, ignore_index=NONE, reduction="sum")
        # The mean over all images that count, of which one rank may have more than another.
        count = collectives.mean((clusters[0] != NONE).sum().to(rows.dtype)).clamp_min(1e-9)
        return total / (len(clusters) * views * count)

    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        for view, bank in enumerate(self.both_banks()):
            bank.follow(batch.index, unit(z["z"][:, view]), momentum=0.0)
        self.seen[collectives.gather(batch.index)] = True

    def scalars(self) -> dict[str, float]:
        """The share of prototypes that some image is assigned to, and of images that are in no cluster."""
        in_use = sum(len(of[of != NONE].unique()) for of in self.clusters) / sum(self.counts)
        return {"clusters_used": in_use, "left_out": (self.clusters[0] == NONE).float().mean().item()}
