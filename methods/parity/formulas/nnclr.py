"""NNCLR's formula, with the nearest key found by plain comparison; and constructions that lose a part of it."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.nnclr import NNCLR
from kilobatch.methods.parity.standard import TEMPERATURE, Construction, Standard, own_slice, without_bias

KEYS = 96


def build(mode: Mode) -> Method:
    queue = QueueOptions(length=KEYS, placement="sharded")
    method = NNCLR(ConvNet(4, mode), temperature=TEMPERATURE, queue=queue, dim=8, width=32, hidden=32)
    return without_bias(method, "predictor.3.bias")


def held(method: Method) -> Tensor:
    return cast(NNCLR, method).queue.keys


def one_way(z: Tensor, p: Tensor, keys: Tensor, first: int) -> Tensor:
    """Dwibedi et al., eq. 3, image by image; row i of z (n, D) belongs to row first + i of p (N, D)."""
    total = z.new_zeros(())
    for i, z_i in enumerate(z):
        nearest = keys[(keys - z_i).square().sum(1).argmin()]
        similar = (p @ nearest / TEMPERATURE).exp()
        total = total - (similar[first + i] / similar.sum()).log()
    return total / len(z)


def symmetric(z: Tensor, p: Tensor, keys: Tensor, first: int = 0) -> Tensor:
    z, p = F.normalize(z.detach(), dim=-1), F.normalize(p, dim=-1)
    return (one_way(z[:, 0], p[:, 1], keys, first) + one_way(z[:, 1], p[:, 0], keys, first)) / 2


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    return symmetric(z["z"], z["p"], held(method))


def remembered(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """The step's first projections replace the oldest."""
    return torch.cat([held(method), F.normalize(z["z"][:, 0].detach(), dim=-1)])[-KEYS:]


def _whole(method: Method) -> Tensor:
    return collectives.gather(held(method))


def _first(z: Tensors) -> int:
    return collectives.rank() * len(z["z"])


STANDARD = Standard(
    build,
    formula,
    samples=48,  # norms see one view at a time: with fewer, fp32 errors exceed the limit in some layouts
    constructions=(
        Construction(
            "predictions gathered with gradient, the queue of all ranks",
            lambda method, z, t, batch: symmetric(z["z"], collectives.gather(z["p"]), _whole(method), _first(z)),
            formula,
            True,
        ),
        Construction(
            "predictions gathered without gradient",
            lambda method, z, t, batch: symmetric(z["z"], own_slice(z["p"]), _whole(method), _first(z)),
            formula,
            False,
        ),
        Construction(
            "neighbours in the own rank's part of the queue",
            lambda method, z, t, batch: symmetric(z["z"], collectives.gather(z["p"]), held(method), _first(z)),
            formula,
            False,
        ),
        Construction(
            "whole loss on every rank, own slice",
            lambda method, z, t, batch: symmetric(collectives.gather(z["z"]), own_slice(z["p"]), _whole(method)),
            formula,
            False,
        ),
        Construction(
            "predictions of the own rank only",
            lambda method, z, t, batch: symmetric(z["z"], z["p"], _whole(method)),
            formula,
            False,
        ),
    ),
    held=held,
    remembered=remembered,
)
