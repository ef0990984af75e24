"""SimSiam's formula; and constructions that lose a part of it."""

from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.simsiam import SimSiam
from kilobatch.methods.parity.standard import Construction, Standard, own_slice, without_bias


def build(mode: Mode) -> Method:
    return without_bias(SimSiam(ConvNet(4, mode), dim=8, layers=2, hidden=24), "predictor.3.bias")


def cosine(p: Tensor, z: Tensor) -> Tensor:
    """The mean over rows of (n, D)."""
    return ((p * z).sum(1) / (p.square().sum(1) * z.square().sum(1)).sqrt()).mean()


def symmetric(p: Tensor, z: Tensor) -> Tensor:
    """Chen, He, eq. 1 and 2."""
    return -cosine(p[:, 0], z[:, 1]) / 2 - cosine(p[:, 1], z[:, 0]) / 2


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    return symmetric(z["p"], z["z"].detach())


STANDARD = Standard(
    build,
    formula,
    samples=60,  # norms see one view at a time: with fewer, fp32 errors exceed the limit in some layouts
    constructions=(
        Construction("own projections and predictions", formula, formula, True),
        Construction("no stop-gradient", lambda method, z, t, batch: symmetric(z["p"], z["z"]), formula, False),
        Construction(
            "whole loss on every rank, own slice",
            lambda method, z, t, batch: symmetric(own_slice(z["p"]), collectives.gather(z["z"]).detach()),
            formula,
            False,
        ),
    ),
)
