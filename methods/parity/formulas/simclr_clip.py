"""CLIP's formula with a learnt temperature, as an option of SimCLR; and constructions that lose a part of it."""

from typing import cast

import torch
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.methods.parity.formulas.simclr import clip_formula
from kilobatch.methods.parity.standard import TEMPERATURE, Construction, Standard, own_slice


def build(mode: Mode) -> Method:
    return SimCLR(ConvNet(4, mode), temperature=TEMPERATURE, dim=8, loss="clip", learn_temperature=True)


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    z1, z2 = z["z"].unbind(1)
    return clip_formula(z1, z2, temperature(method))


def temperature(method: Method) -> Tensor:
    scale = cast(SimCLR, method).log_scale
    assert scale is not None
    return torch.exp(-scale)


def fixed_temperature(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """The formula with a temperature that has no gradient."""
    z1, z2 = z["z"].unbind(1)
    return clip_formula(z1, z2, temperature(method).detach())


STANDARD = Standard(
    build,
    formula,
    constructions=(
        Construction(
            "whole loss on every rank, gather whose backward sums",
            lambda method, z, t, batch: formula(method, {"z": collectives.gather(z["z"])}, t, batch),
            formula,
            True,
        ),
        # The temperature's gradient would be whole while the weights' would be a quarter, so it has none here.
        Construction(
            "whole loss on every rank, own slice",
            lambda method, z, t, batch: fixed_temperature(method, {"z": own_slice(z["z"])}, t, batch),
            fixed_temperature,
            False,
        ),
        Construction("pairs of the own rank only", formula, formula, False),
    ),
)
