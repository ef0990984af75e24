"""MiCE's formula: an explicit mixture of likelihoods against a whole queue; and constructions that lose a part."""

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
from kilobatch.methods.papers.mice import MiCE
from kilobatch.methods.parity.standard import TEMPERATURE, Construction, GroupShape, Standard, own_slice

EXPERTS, DIM, KEYS, KAPPA = 4, 8, 48, 0.5


def build(mode: Mode) -> Method:
    return MiCE(
        ConvNet(4, mode),
        experts=EXPERTS,
        queue=QueueOptions(length=KEYS, placement="sharded"),
        temperature=TEMPERATURE,
        gate_temperature=KAPPA,
        dim=DIM,
        learn_centres=True,
    )


def mixture(method: Method, f: Tensor, g: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """-log sum_k pi_k Phi_k, every probability written out. f, v (n, K, D), g (n, D), keys (m, K D)."""
    own, likelihood = cast(MiCE, method), f.new_zeros(len(f))
    assert own.learnt is not None
    gates = (g @ own.gates.to(g.dtype).T / KAPPA).exp()
    for k, of in enumerate(keys.view(len(keys), EXPERTS, DIM).unbind(1)):
        q = (f[:, k] + F.normalize(own.centres[k] + own.learnt[k], dim=0)) / TEMPERATURE
        positive, negatives = (q * v[:, k]).sum(1).exp(), (q @ of.T).exp().sum(1)
        likelihood = likelihood + gates[:, k] / gates.sum(1) * positive / (positive + negatives)
    return -likelihood.log().mean()


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """The loss against this rank's part of the queue, which is the whole queue in one process."""
    return mixture(method, z["f"], z["g"], t["v"], held(method))


def held(method: Method) -> Tensor:
    return cast(MiCE, method).queue.keys


def remembered(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """The step's keys, of all experts, replace the oldest."""
    return torch.cat([held(method), t["v"].flatten(1)])[-KEYS:]


def _all_keys(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    return mixture(method, z["f"], z["g"], t["v"], collectives.gather(held(method)))


def _whole_loss(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    keys, v = collectives.gather(held(method)), collectives.gather(t["v"])
    return mixture(method, own_slice(z["f"]), own_slice(z["g"]), v, keys)


STANDARD = Standard(
    build,
    formula,
    groups=(GroupShape(3, 12),),
    constructions=(
        Construction("the queue of all ranks on every rank", _all_keys, formula, True),
        Construction("the own rank's part of the queue only", formula, formula, False),
        Construction("whole loss on every rank, own slice", _whole_loss, formula, False),
    ),
    held=held,
    remembered=remembered,
)
