"""VICReg's formula; and constructions that lose a part of its gradient."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.vicreg import VICReg
from kilobatch.methods.parity.standard import Construction, Loss, Standard, own_slice

Gather = Callable[[Tensor], Tensor]
INVARIANCE, VARIANCE, COVARIANCE = 2, 25, 1  # images of noise differ more than views do: 25 would hide the rest


def build(mode: Mode) -> Method:
    weights = {"invariance": INVARIANCE, "variance": VARIANCE, "covariance": COVARIANCE}
    method = VICReg(ConvNet(4, mode), **weights, dim=8, hidden=32)
    last = method.projector[-1]
    assert isinstance(last, nn.Linear)
    # Standard deviations below and above 1 with fixed and with global norms, so that the hinge is active in some
    # dimensions and not in others. Fixed norms leave the features small.
    nn.init.normal_(last.weight, std=0.3 if mode == "global" else 15.0)
    return method


def spread(z: Tensor) -> tuple[Tensor, Tensor]:
    """One view's terms: the hinge of the variance, eq. 1, and the covariance off the diagonal, eq. 4."""
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (len(z) - 1)
    off = covariance - covariance.diagonal().diag()
    return F.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean(), off.square().sum() / z.shape[1]


def over_ranks(gather: Gather) -> Loss:
    """The invariance of this rank's pairs; the variance and the covariance of all rows that `gather` returns."""

    def loss(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        x, y = z["z"].unbind(1)
        (vx, cx), (vy, cy) = spread(gather(x)), spread(gather(y))
        return INVARIANCE * (x - y).square().mean() + VARIANCE * (vx + vy) / 2 + COVARIANCE * (cx + cy)

    return loss


# Bardes et al., eq. 6, with the means of the authors' code; all samples in one process.
formula = over_ranks(lambda z: z)

STANDARD = Standard(
    build,
    formula,
    samples=48,  # of those tried, so many keep the inputs of ReLUs farthest from 0 (5e-6), where fp32 may round across
    constructions=(
        Construction("rows of all ranks, gather whose backward sums", over_ranks(collectives.gather), formula, True),
        Construction("variance and covariance of the own rank's samples", formula, formula, False),
        Construction("rows of all ranks, gather whose backward keeps its slice", over_ranks(own_slice), formula, False),
        Construction(
            "whole loss on every rank, own slice",
            lambda method, z, t, batch: formula(method, {"z": own_slice(z["z"])}, t, batch),
            formula,
            False,
        ),
    ),
)
