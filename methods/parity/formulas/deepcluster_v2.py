"""DeepCluster-v2's formula, head by head and view by view, with images that no cluster has; and wrong constructions."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import DataFacts, Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.deepcluster_v2 import DeepClusterV2
from kilobatch.methods.parity.standard import Construction, GroupShape, Standard, own_slice, without_bias

TAU, COUNTS, IMAGES, LEFT_OUT = 0.1, (5, 4, 3), 24, 5


def build(mode: Mode) -> Method:
    """Banks of random rows, as if an epoch had passed that left the first images out."""
    method = DeepClusterV2(ConvNet(4, mode), prototypes=COUNTS, dim=8, hidden=32)
    method.prepare(DataFacts(IMAGES, 1))
    method.seen[LEFT_OUT:] = True
    without_bias(method, "head.3.bias")
    return method


def mean_loss(method: Method, z: Tensor, index: Tensor, count: Tensor | None = None) -> Tensor:
    """The mean over heads and views, and over the images that are in clusters. z (n, V, D); count: of images by which a
    sum is divided, None: of these that are in clusters."""
    own, total, first = cast(DeepClusterV2, method), z.new_zeros(()), 0
    for head, k in enumerate(COUNTS):
        prototypes, cluster = own.prototypes[first : first + k].to(z.dtype), own.clusters[head, index]
        first += k
        kept = cluster >= 0
        for view in z[kept].unbind(1):
            p = (F.normalize(view, dim=1) @ prototypes.T / TAU).exp()
            own_p = p[torch.arange(len(p)), cluster[kept].long()]
            total = total - (own_p / p.sum(1)).log().sum() / (kept.sum() if count is None else count) / z.shape[1]
    return total / len(COUNTS)


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    return mean_loss(method, z["z"], batch.index)


def _sums(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """This rank's sum, divided by the mean count of a rank."""
    kept = cast(DeepClusterV2, method).clusters[0, collectives.gather(batch.index)] >= 0
    return mean_loss(method, z["z"], batch.index, kept.sum() / collectives.world_size())


def _whole_loss(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    return mean_loss(method, own_slice(z["z"]), collectives.gather(batch.index))


def held(method: Method) -> Tensor:
    return torch.cat([bank.rows for bank in cast(DeepClusterV2, method).both_banks()], 1)


def remembered(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """Each image's row is its projection, of the first view and of the second."""
    return F.normalize(z["z"][:, :2].detach(), dim=2).flatten(1)


STANDARD = Standard(
    build,
    formula,
    samples=IMAGES,
    groups=(GroupShape(2, 12), GroupShape(3, 8)),
    constructions=(
        Construction("sums over ranks, divided by the count of all", _sums, formula, True),
        Construction("the mean of each rank's own images in clusters", formula, formula, False),
        Construction("whole loss on every rank, own slice", _whole_loss, formula, False),
    ),
    held=held,
    remembered=remembered,
)
