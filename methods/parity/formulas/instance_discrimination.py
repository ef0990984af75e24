"""Instance discrimination's formula, by noise-contrastive estimation; and constructions that lose a part of it."""

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.counter_rng import key, uniform
from kilobatch.methods import collectives
from kilobatch.methods.method import DataFacts, Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.instance_discrimination import InstanceDiscrimination
from kilobatch.methods.parity.standard import TEMPERATURE, Construction, Standard, own_slice

IMAGES, NOISE, MOMENTUM, PROXIMAL = 48, 12, 0.5, 0.3


def build(mode: Mode) -> Method:
    method = InstanceDiscrimination(
        ConvNet(4, mode),
        form="nce",
        noise=NOISE,
        temperature=TEMPERATURE,
        momentum=MOMENTUM,
        proximal=PROXIMAL,
        dim=8,
    )
    method.prepare(DataFacts(IMAGES, 1))
    return method


def noise(image: int, view: int) -> list[int]:
    """The noise images of the first step."""
    noise_key = np.uint64(key(0, 0, image, view))
    return [int(uniform(noise_key, draw) * IMAGES) for draw in range(NOISE)]


def nce_formula(v: Tensor, rows: Tensor, first: int) -> Tensor:
    """Wu et al., eq. 6 and 7, and NCECriterion.py. v (n, D), of the images from `first` on; rows (IMAGES, D)."""
    index = torch.tensor([[i, *noise(i, 0)] for i in range(first, first + len(v))])
    e = ((rows[index] * v[:, None]).sum(2) / TEMPERATURE).exp()  # (n, 1 + m)
    p = e / (e.detach().mean() * IMAGES)
    h = p / (p + NOISE / IMAGES)
    return (-h[:, 0].log() - (1 - h[:, 1:]).log().sum(1)).mean()


def _proximal(v: Tensor, rows: Tensor, first: int) -> Tensor:
    return PROXIMAL * (v - rows[first : first + len(v)]).square().sum(1).mean()


def all_rows(method: Method) -> Tensor:
    """The rows of the bank on all ranks, in the order of images."""
    rows = collectives.gather(held(method)).unflatten(0, (collectives.world_size(), -1))
    return rows.transpose(0, 1).flatten(0, 1)


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    v = z["v"][:, 0]
    return nce_formula(v, held(method), 0) + _proximal(v, held(method), 0)


def held(method: Method) -> Tensor:
    return cast(InstanceDiscrimination, method).bank.rows


def remembered(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """The bank with the rows of the step's images moved and scaled to length 1."""
    rows, v = held(method).clone(), z["v"][:, 0].detach()
    rows[: len(v)] = F.normalize(MOMENTUM * rows[: len(v)] + (1 - MOMENTUM) * v, dim=1)
    return rows


def _z_of_rank(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """The loss with a constant Z estimated from this rank's images alone."""
    v, first = z["v"][:, 0], collectives.rank() * len(z["v"])
    return nce_formula(v, all_rows(method), first) + _proximal(v, all_rows(method), first)


def _whole_loss(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    v, rows = own_slice(z["v"][:, 0]), all_rows(method)
    return nce_formula(v, rows, 0) + _proximal(v, rows, 0)


STANDARD = Standard(
    build,
    formula,
    constructions=(
        Construction("Z of each rank's own images", _z_of_rank, formula, False),
        Construction("whole loss on every rank, own slice", _whole_loss, formula, False),
    ),
    held=held,
    remembered=remembered,
)
