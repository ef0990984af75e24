"""A method that uses every place of the protocol at once, its formula, and its training from a file with fields.

Images of two sizes and words of the same sample are embedded together; images are mixed with partners; clusters of an
epoch, a queue, a momentum encoder, prototypes and a temperature are in the loss; chance is in the network.
"""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.data.tensor_rng import child, uniforms
from kilobatch.methods import collectives
from kilobatch.methods.losses.contrastive import info_nce
from kilobatch.methods.memories.momentum_encoder import MomentumEncoder, rising
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.method import DataFacts, EpochFeatures, Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.keyed_layers import KeyedDropout, KeyedDropPath, KeyedNoise
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.parameter_groups import ParameterGroup
from kilobatch.methods.parity.standard import Construction, GroupShape, Standard
from kilobatch.methods.partners import draw_partners

SAMPLES, CLASSES, DIM, WORDS, CAPTIONS, LENGTH = 24, 3, 16, 20, 3, 4
KEYS, CLUSTERS, BLOCK, TEMPERATURE = 48, 4, 2, 0.2
SHARE, CAPTION = 0x736861, 0x636170  # places below the keys of samples
FIXED = 2.0**30  # of sums as integers


class Net(Encoder):
    """A small encoder in which dropout, drop path and noise draw, and a part of which is computed again."""

    def __init__(self, norm: Mode) -> None:
        super().__init__()
        self.body, self.features, self.norm, self.recomputes = ConvNet(2, norm), DIM, norm, True
        self.block = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), KeyedDropout(0.3))
        self.path, self.noise = KeyedDropPath(0.2), KeyedNoise()

    def forward(self, images: Tensor) -> Tensor:
        x = self.body(images)
        return self.noise(x + self.path(self.run(self.block, x)), 0.1)

    def stages(self, images: Tensor) -> list[Tensor]:
        return self.body.stages(images)


class ProtocolToy(Method):
    views: ClassVar[int | None] = 2
    further_groups: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    kept: ClassVar[str] = "teacher.network"
    encoder: Net  # pyright: ignore[reportIncompatibleVariableOverride]
    counts: Tensor
    center: Tensor
    cluster: Tensor
    centroids: Tensor
    hooks: Tensor  # how often before_epoch has run: a second run of it shows in the state

    def __init__(self, norm: Mode) -> None:
        super().__init__()
        self.encoder = Net(norm)  # pyright: ignore
        self.head = nn.Linear(DIM, DIM)
        self.table = nn.Embedding(WORDS, DIM)
        self.prototypes = nn.Parameter(torch.randn(CLUSTERS, DIM))
        self.temperature = nn.Parameter(torch.tensor([TEMPERATURE]))
        self.frozen = nn.Parameter(torch.ones(3))
        self.teacher = MomentumEncoder(self.encoder, own_statistics=True)
        self.queue = Queue(QueueOptions(length=KEYS, placement="sharded"), DIM)

    def prepare(self, data: DataFacts) -> None:
        self.register_buffer("counts", torch.tensor(data.counts or (1,) * data.classes))
        self.register_buffer("center", torch.zeros(DIM))
        self.register_buffer("cluster", torch.zeros(data.images, dtype=torch.int64))
        self.register_buffer("centroids", torch.zeros(CLUSTERS, DIM))
        self.register_buffer("hooks", torch.zeros(1, dtype=torch.int64))

    def before_epoch(self, epoch: int, features: EpochFeatures) -> None:
        """Two iterations of k-means from the samples that (epoch) draws."""
        index, x = features(lambda images: unit(self.teacher(images)))
        images, x = len(self.cluster), (x * FIXED).round().long()  # sums of integers are the same for any ranks
        first = child(torch.arange(images), epoch).argsort()[:CLUSTERS]
        place, k = (index[:, None] == first).nonzero().unbind(1)
        centroids, cluster = centres(x[place], k), index
        for _ in range(2):
            cluster = (x.double() @ centroids.T).argmax(1)
            centroids = centres(x, cluster)
        found = torch.zeros(images, dtype=torch.int64).index_put((index,), cluster)
        self.cluster.copy_(collectives.all_reduce_sum(found))
        self.centroids.copy_(centroids)
        self.hooks += 1

    def epoch_order(self, epoch: int) -> Tensor | None:
        """Cluster by cluster: of what the hook has found, so that a lost buffer shows in the batches."""
        if epoch % 2:
            return None
        shuffled = child(torch.arange(len(self.cluster)), epoch, 1).argsort()
        return shuffled[self.cluster.cpu()[shuffled].argsort(stable=True)]

    def arrange(self, batch: Batch) -> Batch:
        return mixed(batch, BLOCK)

    def embed(self, batch: Batch) -> Tensors:
        h = [self.encoder(views.flatten(0, 1)).unflatten(0, views.shape[:2]) for views in batch.views]
        maps = self.encoder.stages(batch.views[1][:, 0])[-1]
        return {"z": unit(self.head(torch.cat(h, 1))), "text": unit(self.words(batch)), "map": maps.mean((2, 3))}

    def words(self, batch: Batch) -> Tensor:
        """(n, D) of one caption of each sample, by its key."""
        captions = batch.fields["tokens"]
        which = (uniforms(child(batch.keys, CAPTION), torch.zeros_like(batch.keys)) * CAPTIONS).long()
        return self.table(captions[torch.arange(len(batch)), which]).mean(1)

    def target(self, batch: Batch) -> Tensors:
        return {"t": unit(self.teacher(batch.views[0][:, 1]))}

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        a, b, *small = z["z"].unbind(1)
        own = collectives.local_rows(len(a))
        logits = a @ collectives.gather(b).T / self.temperature
        share = batch.fields["share"].to(a.dtype)
        nce = share * F.cross_entropy(logits, own, reduction="none")
        nce = nce + (1 - share) * F.cross_entropy(logits, own[batch.fields["partner"]], reduction="none")
        remembered = info_nce(a, t["t"], self.queue, TEMPERATURE) * batch.clock.progress
        c = self.prototypes / self.prototypes.norm(dim=1, keepdim=True).detach()
        cluster = self.cluster[batch.index]
        clustered = F.cross_entropy(b @ c.T / TEMPERATURE, cluster) - (b * self.centroids[cluster]).sum(1).mean()
        crops = torch.stack([(s * (t["t"] - self.center)).sum(1) for s in small]).mean()
        words = (z["text"] * b).sum(1) / self.counts[batch.label]
        return nce.mean() + remembered + clustered - crops - words.mean() + z["map"].square().mean()

    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        self.queue.push(t["t"])
        self.center.lerp_(collectives.mean(t["t"].mean(0)), 0.1)
        self.teacher.follow(self.encoder, rising(0.9, batch.clock.after))

    def groups(self) -> Sequence[ParameterGroup]:
        return [
            ParameterGroup("prototypes", from_epoch=1.5),
            ParameterGroup("frozen", from_epoch=float("inf")),
            ParameterGroup("table", lr=0.5, schedule=False, decay=2.0),
            ParameterGroup("head", adapt=False),
        ]

    def represent_batch(self, batch: Batch) -> Tensor:
        return torch.cat([self.represent(batch.views[0][:, 0]), self.words(batch)], 1)

    def measured(self, z: Tensors, t: Tensors) -> Tensor | None:
        return z["z"][:, :2]

    def scalars(self) -> dict[str, float]:
        return {"clusters": float(len(self.cluster.unique()))}


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def centres(x: Tensor, cluster: Tensor) -> Tensor:
    """(CLUSTERS, D) float64, unit rows: of the sums over all ranks of the rows x (n, D) int64 of each cluster."""
    sums = torch.zeros(CLUSTERS, DIM, dtype=torch.int64).index_add(0, cluster, x)
    return F.normalize(collectives.all_reduce_sum(sums).double(), dim=1)


def mixed(batch: Batch, block: int) -> Batch:
    """Each sample's first view with a share of its partner's."""
    partner = draw_partners(batch, block)
    share = uniforms(child(batch.keys, SHARE), torch.zeros_like(batch.keys))
    large, *others = batch.views
    large = large.clone()
    part = share.to(large.dtype).view(-1, 1, 1, 1)
    large[:, 0] = part * large[:, 0] + (1 - part) * large[partner, 0]
    return batch.replaced(views=(large, *others)).with_fields(partner=partner, share=share)


def build(norm: Mode) -> Method:
    method = ProtocolToy(norm)
    method.prepare(DataFacts(SAMPLES, CLASSES, (8, 8, 8)))
    return method


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """The loss of all samples, sample by sample."""
    method = cast(ProtocolToy, method)
    losses = []
    for i in range(len(batch)):
        a, b, *small = z["z"][i]
        similar = (z["z"][:, 1] @ a / method.temperature).exp()
        share, partner = batch.fields["share"][i], batch.fields["partner"][i]
        nce = share * (similar[i] / similar.sum()).log() + (1 - share) * (similar[partner] / similar.sum()).log()
        positive, negatives = (a @ t["t"][i] / TEMPERATURE).exp(), (method.queue.keys @ a / TEMPERATURE).exp().sum()
        remembered = (positive / (positive + negatives)).log() * batch.clock.step / batch.clock.steps
        cluster = method.cluster[batch.index[i]]
        c = method.prototypes / method.prototypes.detach().square().sum(1, keepdim=True).sqrt()
        scores = (c @ b / TEMPERATURE).exp()
        clustered = (scores[cluster] / scores.sum()).log() + b @ method.centroids[cluster]
        crops = torch.stack([s @ (t["t"][i] - method.center) for s in small]).mean()
        words = z["text"][i] @ b / method.counts[batch.label[i]]
        losses.append(z["map"][i].square().mean() - nce - remembered - clustered - crops - words)
    return torch.stack(losses).mean()


def held(method: Method) -> Tensor:
    return cast(ProtocolToy, method).queue.keys


def remembered(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    return torch.cat([held(method), t["t"]])[-KEYS:]


def labels(samples: int) -> Tensor:
    return torch.arange(samples) * 7 % CLASSES


def fields(samples: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {"tokens": torch.randint(WORDS, (samples, CAPTIONS, LENGTH), generator=generator)}


def own_loss(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    return method.loss(z, t, batch)


STANDARD = Standard(
    build,
    formula,
    constructions=(
        Construction("partners in blocks", own_loss, formula, True),
        Construction(
            "partners among a rank's whole batch", own_loss, formula, False, lambda method, b: mixed(b, len(b))
        ),
    ),
    groups=(GroupShape(2, 12), GroupShape(3, 8)),
    labels=labels,
    fields=fields,
    held=held,
    remembered=remembered,
)
