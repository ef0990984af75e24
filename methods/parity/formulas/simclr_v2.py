"""SimCLRv2's formula with a memory in addition to the batch; and constructions that lose a part of it."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.simclr_v2 import SimCLRV2
from kilobatch.methods.parity.standard import TEMPERATURE, Construction, Standard, own_slice

SAMPLES, KEYS = 48, 48


def build(mode: Mode) -> Method:
    queue = QueueOptions(length=KEYS, placement="sharded")
    return SimCLRV2(ConvNet(4, mode), temperature=TEMPERATURE, dim=8, queue=queue)


def formula_with_keys(z: Tensor, keys: Tensor) -> Tensor:
    """z (n, 2, D), keys (K, D): the mean over all 2n anchors of -log softmax over the 2n - 1 others and the keys."""
    u = F.normalize(z.transpose(0, 1).flatten(0, 1), dim=1)
    own_columns = torch.arange(len(u))
    logits = torch.cat([(u @ u.T).scatter(1, own_columns[:, None], -torch.inf), u @ keys.T], 1) / TEMPERATURE
    return F.cross_entropy(logits, own_columns.roll(len(z)))


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """The loss with this rank's part of the queue, which is the whole queue in one process."""
    return formula_with_keys(z["z"], held(method))


def held(method: Method) -> Tensor:
    return cast(Queue, cast(SimCLRV2, method).queue).keys


def remembered(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """The step's keys replace the oldest. Before the step the queue goes from the oldest to the newest."""
    return torch.cat([held(method), t["key"]])[-KEYS:]


STANDARD = Standard(
    build,
    formula,
    constructions=(
        Construction(
            "batch and queue of the own rank only",
            formula,
            formula,
            False,
        ),
        Construction(
            "the batch of all ranks, the own rank's part of the queue",
            lambda method, z, t, batch: formula_with_keys(collectives.gather(z["z"]), held(method)),
            formula,
            False,
        ),
        Construction(
            "whole loss on every rank, own slice",
            lambda method, z, t, batch: formula_with_keys(own_slice(z["z"]), collectives.gather(held(method))),
            formula,
            False,
        ),
        Construction(
            "whole loss on every rank, gather whose backward sums",
            lambda method, z, t, batch: formula_with_keys(collectives.gather(z["z"]), collectives.gather(held(method))),
            formula,
            True,
        ),
    ),
    samples=SAMPLES,
    held=held,
    remembered=remembered,
)
