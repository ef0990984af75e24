"""SwAV's formula with full queues, whose rows are balanced along with the batch."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.swav import SwAV
from kilobatch.methods.parity.formulas.swav import PROTOTYPES, swapped
from kilobatch.methods.parity.standard import Construction, GroupShape, Standard, without_bias

KEYS, DIM = 96, 8


def build(mode: Mode) -> Method:
    options = QueueOptions(length=KEYS, placement="sharded")
    method = SwAV(ConvNet(4, mode), prototypes=PROTOTYPES, dim=DIM, hidden=32, queue=options, queue_epoch=0)
    without_bias(method, "head.3.bias")
    method.queues = nn.ModuleList([Queue(options, DIM), Queue(options, DIM)])  # full from the start
    cast(Queue, method.queues[1]).keys.neg_()
    return method


def queues(method: Method) -> tuple[Tensor, ...]:
    return tuple(cast(Queue, queue).keys for queue in cast(SwAV, method).queues)


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    return swapped(z["z"], cast(SwAV, method).prototypes.weight, queues=queues(method))


def _gathered(method: Method, z: Tensors, t: Tensors, batch: Batch, share: bool = False) -> Tensor:
    large = collectives.gather(z["z"][:, :2].detach())
    keys = queues(method) if share else tuple(collectives.gather(x) for x in queues(method))
    first = collectives.rank() * len(z["z"])
    return swapped(z["z"], cast(SwAV, method).prototypes.weight, large, first, keys)


def held(method: Method) -> Tensor:
    return queues(method)[0]


def remembered(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """The step's first views replace the oldest rows."""
    return torch.cat([held(method), F.normalize(z["z"][:, 0].detach(), dim=-1)])[-KEYS:]


STANDARD = Standard(
    build,
    formula,
    samples=48,
    groups=(GroupShape(2, 12), GroupShape(3, 8)),
    constructions=(
        Construction("scores and queues of all ranks, balanced on every rank", _gathered, formula, True),
        Construction(
            "the own rank's part of the queue only",
            lambda method, z, t, batch: _gathered(method, z, t, batch, share=True),
            formula,
            False,
        ),
    ),
    held=held,
    remembered=remembered,
)
