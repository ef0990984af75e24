"""PCL's formula, query by query; and constructions that lose a part of it."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.method import DataFacts, Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.pcl import PCL
from kilobatch.methods.parity.formulas.moco import KEYS, held, infonce_formula, remembered
from kilobatch.methods.parity.standard import TEMPERATURE, Construction, Standard, own_slice, without_bias

IMAGES, CLUSTERS = 24, (5, 9)  # the batch has all images, so that each prototype has one in it, and none is drawn


def build(mode: Mode) -> Method:
    method = PCL(
        ConvNet(4, mode),
        clusters=CLUSTERS,
        warmup_epochs=0,
        negatives=4,
        rounds=5,
        redos=2,
        queue=QueueOptions(length=KEYS, placement="sharded"),
        temperature=TEMPERATURE,
        dim=8,
    )
    method.prepare(DataFacts(IMAGES, 1))
    return without_bias(method, "head.2.bias")


def prototypical(method: Method, q: Tensor, images: Tensor, others: Iterable[int]) -> Tensor:
    """Eq. 11 without InfoNCE. q (n, 1, D), of these images; others: images whose prototypes it is compared with."""
    losses: list[Tensor] = []
    for prototypes in cast(PCL, method).prototypes():
        cluster, c, phi = prototypes.assignment.tolist(), prototypes.centroids, prototypes.phi
        candidates = sorted({cluster[image] for image in others})
        for query, image in zip(q[:, 0], images.tolist(), strict=True):
            own = cluster[image]
            weights = {s: (query @ c[s] / phi[s]).exp() for s in candidates}
            losses.append(-(weights[own] / torch.stack([*weights.values()]).sum()).log())
    return torch.stack(losses).mean()


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    instance = infonce_formula(z["q"], t["k"], held(method))
    return instance + prototypical(method, z["q"], batch.index, range(IMAGES))


def _whole_queue(method: Method, z: Tensors, t: Tensors, batch: Batch, others: Iterable[int]) -> Tensor:
    instance = infonce_formula(z["q"], t["k"], collectives.gather(held(method)))
    return instance + prototypical(method, z["q"], batch.index, others)


def _on_every_rank(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    everyone = {"q": own_slice(z["q"])}, {"k": collectives.gather(t["k"])}
    whole = batch.replaced(index=collectives.gather(batch.index))
    return _whole_queue(method, *everyone, whole, range(IMAGES))


STANDARD = Standard(
    build,
    formula,
    samples=IMAGES,
    constructions=(
        Construction(
            "the queue and the prototypes of all ranks on every rank",
            lambda method, z, t, batch: _whole_queue(method, z, t, batch, range(IMAGES)),
            formula,
            True,
        ),
        Construction(
            "prototypes of the own rank's images only",
            lambda method, z, t, batch: _whole_queue(method, z, t, batch, batch.index.tolist()),
            formula,
            False,
        ),
        Construction(
            "the own rank's part of the queue only",
            formula,
            formula,
            False,
        ),
        Construction("whole loss on every rank, own slice", _on_every_rank, formula, False),
    ),
    held=held,
    remembered=remembered,
)
