"""MoCHi's formula; and constructions that lose a part of it."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.counter_rng import key, uniform
from kilobatch.methods import collectives
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.mochi import MoCHi
from kilobatch.methods.parity.formulas.moco import KEYS, held, remembered
from kilobatch.methods.parity.standard import TEMPERATURE, Construction, Standard, own_slice

HARD, MIXED, WITH_QUERY = 8, 10, 6


def build(mode: Mode) -> Method:
    queue = QueueOptions(length=KEYS, placement="sharded")
    return MoCHi(
        ConvNet(4, mode),
        hard=HARD,
        mixed=MIXED,
        with_query=WITH_QUERY,
        start=0.0,
        queue=queue,
        temperature=TEMPERATURE,
        dim=8,
    )


def synthetic(q: Tensor, keys: Tensor, image: int) -> Tensor:
    """The negatives of sections 4.1 and 4.2, one by one. q (D,): the image's query in the first step; keys (K, D)."""
    random_key = np.uint64(key(0, 0, image, 0))
    hardest = keys[(keys @ q).argsort(descending=True)[:HARD]]
    negatives: list[Tensor] = []
    for k in range(MIXED):
        first = int(uniform(random_key, k) * HARD)
        second = (first + 1 + int(uniform(random_key, MIXED + k) * (HARD - 1))) % HARD
        alpha = float(uniform(random_key, 2 * MIXED + k))
        negatives.append(alpha * hardest[first] + (1 - alpha) * hardest[second])
    for k in range(WITH_QUERY):
        j = int(uniform(random_key, 3 * MIXED + k) * HARD)
        beta = float(uniform(random_key, 3 * MIXED + WITH_QUERY + k)) / 2
        negatives.append(beta * q + (1 - beta) * hardest[j])
    return F.normalize(torch.stack(negatives), dim=1)


def mochi_formula(q: Tensor, k: Tensor, keys: Tensor, first: int, mixed_from: Tensor | None = None) -> Tensor:
    """MoCHi's loss. q, k (n, 1, D), of the images from `first` on; keys (K, D); mixed_from: by default all of keys."""
    mixed_from = keys if mixed_from is None else mixed_from
    losses: list[Tensor] = []
    for i, (query, positive) in enumerate(zip(q[:, 0], k[:, 0], strict=True)):
        negatives = torch.cat([keys, synthetic(query.detach(), mixed_from, first + i)])
        logits = torch.cat([(query @ positive)[None], negatives @ query]) / TEMPERATURE
        losses.append(logits.logsumexp(0) - logits[0])
    return torch.stack(losses).mean()


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    return mochi_formula(z["q"], t["k"], held(method), 0)


STANDARD = Standard(
    build,
    formula,
    constructions=(
        Construction(
            "the queue of all ranks on every rank",
            lambda method, z, t, batch: mochi_formula(
                z["q"], t["k"], collectives.gather(held(method)), collectives.rank() * len(z["q"])
            ),
            formula,
            True,
        ),
        Construction(
            "mixed from the own rank's part of the queue",
            lambda method, z, t, batch: mochi_formula(
                z["q"], t["k"], collectives.gather(held(method)), collectives.rank() * len(z["q"]), held(method)
            ),
            formula,
            False,
        ),
        Construction(
            "whole loss on every rank, own slice",
            lambda method, z, t, batch: mochi_formula(
                own_slice(z["q"]), collectives.gather(t["k"]), collectives.gather(held(method)), 0
            ),
            formula,
            False,
        ),
    ),
    held=held,
    remembered=remembered,
)
