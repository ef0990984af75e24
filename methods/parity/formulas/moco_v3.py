"""MoCo v3's formula; and constructions that lose a part of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.moco_v3 import MoCoV3
from kilobatch.methods.parity.standard import TEMPERATURE, Construction, Standard, no_gradient, own_slice


def build(mode: Mode) -> Method:
    return MoCoV3(ConvNet(4, mode), temperature=TEMPERATURE, dim=8, hidden=32)


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """Chen et al., algorithm 1: loss = ctr(q1, k2) + ctr(q2, k1), all samples in one process."""
    return _symmetric(z["q"], t["k"], 0)


def _symmetric(q: Tensor, k: Tensor, offset: int) -> Tensor:
    """The loss of q (n, 2, D), whose keys are rows `offset` and following of k (N, 2, D)."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    labels = torch.arange(offset, offset + len(q))
    logits = q[:, 0] @ k[:, 1].T / TEMPERATURE, q[:, 1] @ k[:, 0].T / TEMPERATURE
    return 2 * TEMPERATURE * (F.cross_entropy(logits[0], labels) + F.cross_entropy(logits[1], labels))


STANDARD = Standard(
    build,
    formula,
    samples=60,  # norms see one view at a time: with fewer, fp32 errors exceed the limit in some layouts
    constructions=(
        Construction(
            "own queries, keys gathered without gradient",  # they carry none
            lambda method, z, t, batch: _symmetric(z["q"], no_gradient(t["k"]), collectives.rank() * len(z["q"])),
            formula,
            True,
        ),
        Construction(
            "keys of the own rank only", lambda method, z, t, batch: _symmetric(z["q"], t["k"], 0), formula, False
        ),
        Construction(
            "whole loss on every rank, own slice",
            lambda method, z, t, batch: _symmetric(own_slice(z["q"]), collectives.gather(t["k"]), 0),
            formula,
            False,
        ),
    ),
)
