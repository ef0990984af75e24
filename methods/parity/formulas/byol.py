"""BYOL's formula; and constructions that lose a part of it."""

from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.byol import BYOL
from kilobatch.methods.parity.standard import Construction, Standard, own_slice


def build(mode: Mode) -> Method:
    return BYOL(ConvNet(4, mode), dim=8, hidden=32)


def distance(p: Tensor, z: Tensor) -> Tensor:
    """Grill et al., eq. 2: the squared distance of unit vectors, the mean over rows. p, z (n, D)."""
    p, z = p / p.square().sum(1, keepdim=True).sqrt(), z / z.square().sum(1, keepdim=True).sqrt()
    return (p - z).square().sum(1).mean()


def symmetric(p: Tensor, z: Tensor) -> Tensor:
    return distance(p[:, 0], z[:, 1]) + distance(p[:, 1], z[:, 0])


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    return symmetric(z["p"], t["z"])


STANDARD = Standard(
    build,
    formula,
    samples=60,  # norms see one view at a time: with fewer, fp32 errors exceed the limit in some layouts
    constructions=(
        Construction("own predictions and targets", formula, formula, True),
        Construction(
            "whole loss on every rank, own slice",
            lambda method, z, t, batch: symmetric(own_slice(z["p"]), collectives.gather(t["z"])),
            formula,
            False,
        ),
        Construction(
            "the mean over views, not the sum",
            lambda method, z, t, batch: symmetric(z["p"], t["z"]) / 2,
            formula,
            False,
        ),
    ),
)
