"""PIRL's formula, in the form softmax; and constructions that lose a part of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import DataFacts, Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.pirl import PIRL
from kilobatch.methods.parity.formulas.instance_discrimination import IMAGES, MOMENTUM, all_rows, held, remembered
from kilobatch.methods.parity.standard import TEMPERATURE, Construction, Standard, own_slice

PRETEXT = 0.3


def build(mode: Mode) -> Method:
    method = PIRL(ConvNet(4, mode), form="softmax", temperature=TEMPERATURE, momentum=MOMENTUM, pretext=PRETEXT, dim=8)
    method.prepare(DataFacts(IMAGES, 1))
    return method


def softmax_formula(v: Tensor, rows: Tensor, first: int) -> Tensor:
    """Misra and van der Maaten, eq. 5, with the softmax. v (n, 2, D), of images from `first` on; rows (IMAGES, D)."""
    labels = torch.arange(first, first + len(v))
    image, jigsaw = (F.cross_entropy(u @ rows.T / TEMPERATURE, labels) for u in v.unbind(1))
    return PRETEXT * jigsaw + (1 - PRETEXT) * image


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    return softmax_formula(z["v"], held(method), 0)


STANDARD = Standard(
    build,
    formula,
    constructions=(
        Construction(
            "the bank of all ranks on every rank",
            lambda method, z, t, batch: softmax_formula(z["v"], all_rows(method), collectives.rank() * len(z["v"])),
            formula,
            True,
        ),
        Construction(
            "the rows of the own rank's images only",
            lambda method, z, t, batch: softmax_formula(
                z["v"], all_rows(method)[collectives.local_rows(len(z["v"]))], 0
            ),
            formula,
            False,
        ),
        Construction(
            "whole loss on every rank, own slice",
            lambda method, z, t, batch: softmax_formula(own_slice(z["v"]), all_rows(method), 0),
            formula,
            False,
        ),
    ),
    held=held,
    remembered=remembered,
)
