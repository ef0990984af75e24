"""MoCo's formula, with its queue; and constructions that lose a part of it."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.moco import MoCo
from kilobatch.methods.parity.standard import TEMPERATURE, Standard, queue_constructions

KEYS = 48


def build(mode: Mode) -> Method:
    queue = QueueOptions(length=KEYS, placement="sharded")
    return MoCo(ConvNet(4, mode), queue=queue, temperature=TEMPERATURE, dim=8)


def infonce_formula(q: Tensor, k: Tensor, keys: Tensor) -> Tensor:
    """He et al., eq. 1. q, k (n, 1, D), keys (K, D)."""
    q, k = q[:, 0], k[:, 0]
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ keys.T], 1) / TEMPERATURE  # the positive stands first
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """The loss against this rank's part of the queue, which is the whole queue in one process."""
    return infonce_formula(z["q"], t["k"], held(method))


def held(method: Method) -> Tensor:
    return cast(MoCo, method).queue.keys


def remembered(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """Algorithm 1: the step's keys replace the oldest. Before the step the queue goes from the oldest to the newest."""
    return torch.cat([held(method), t["k"][:, 0]])[-KEYS:]


STANDARD = Standard(
    build,
    formula,
    constructions=queue_constructions(infonce_formula, "q", "k", held),
    held=held,
    remembered=remembered,
)
