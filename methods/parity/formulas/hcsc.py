"""HCSC's formula, query by query and key by key; and constructions that lose a part of it."""

from collections.abc import Iterable
from typing import cast

import numpy as np
import torch
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.counter_rng import mix, uniform
from kilobatch.data.tensor_rng import SELECTED_KEYS, SELECTED_PROTOTYPES
from kilobatch.methods import collectives
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.method import DataFacts, Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.hcsc import HCSC
from kilobatch.methods.parity.formulas.moco import KEYS, held, remembered
from kilobatch.methods.parity.standard import TEMPERATURE, Construction, Standard, own_slice, without_bias

IMAGES, CLUSTERS = 24, (9, 5, 3)


def build(mode: Mode) -> Method:
    method = HCSC(
        ConvNet(4, mode),
        clusters=CLUSTERS,
        warmup_epochs=0,
        rounds=5,
        redos=2,
        queue=QueueOptions(length=KEYS, placement="sharded"),
        temperature=TEMPERATURE,
        dim=8,
    )
    method.prepare(DataFacts(IMAGES, 1))
    return without_bias(method, "head.2.bias")


def chances(sample: int, place: int, level: int, numbers: Iterable[int]) -> Tensor:
    """The numbers of [0, 1) that a sample's key gives at a place and level."""
    key = sample % 2**64
    for part in (place, level):
        key = int(mix(np.uint64(key ^ int(mix(np.uint64(part))))))
    return torch.tensor([float(uniform(np.uint64(key), i)) for i in numbers], dtype=torch.float64)


def memberships(x: Tensor, prototypes: Tensor, phi: Tensor) -> Tensor:
    """The probability that each row of x is of each prototype."""
    weights = (x @ prototypes.T / phi).exp()
    return weights / weights.sum(1, keepdim=True)


def selected(method: Method, q: Tensor, k: Tensor, batch: Batch, keys: Tensor, numbers: Tensor) -> Tensor:
    """The loss of q, k (n, 1, D) against keys (m, D) with numbers (m,)."""
    hierarchy = cast(HCSC, method).hierarchy
    levels, losses = hierarchy.prototypes(), list[Tensor]()
    for level, prototypes in enumerate(levels):
        c, phi, last = prototypes.centroids, prototypes.phi, level == len(levels) - 1
        of_keys = memberships(keys, c, phi.clamp(min=1e-3))
        of_prototypes = None if last else memberships(c, levels[level + 1].centroids, levels[level + 1].phi)
        rows = zip(q[:, 0], k[:, 0], batch.index.tolist(), batch.keys.tolist(), strict=True)
        for query, key, image, sample in rows:
            own = int(prototypes.assignment[image])
            draws = chances(sample, SELECTED_KEYS, level, numbers.tolist())
            kept = draws < (1 - of_keys[:, own]).clamp(0, 0.999)
            positive, similar = (query @ key / TEMPERATURE).exp(), (keys @ query / TEMPERATURE).exp()
            losses.append(-(positive / (positive + similar[kept].sum() + (~kept).sum())).log())
            similar = (c @ query / phi).exp()
            kept = torch.ones(len(c), dtype=torch.bool)
            if of_prototypes is not None:
                draws = chances(sample, SELECTED_PROTOTYPES, level, range(len(c)))
                kept = draws < (1 - of_prototypes[:, int(hierarchy.parents(level)[own])]).clamp(1e-4, 0.999)
                kept[own] = True
            losses.append(-(similar[own] / (similar[kept].sum() + (~kept).sum())).log() / len(levels))
    return torch.stack(losses).sum() / len(q)


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    newest_first = torch.arange(KEYS).flip(0)  # how many keys are newer than each of a ring that starts full
    return selected(method, z["q"], t["k"], batch, held(method), newest_first)


def _all_keys(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    numbers = collectives.gather(cast(HCSC, method).queue.numbers)
    return selected(method, z["q"], t["k"], batch, collectives.gather(held(method)), numbers)


def _places(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    keys = collectives.gather(held(method))
    return selected(method, z["q"], t["k"], batch, keys, torch.arange(len(keys)))


def _own_part(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    return selected(method, z["q"], t["k"], batch, held(method), cast(HCSC, method).queue.numbers)


def _on_every_rank(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    whole = batch.replaced(index=collectives.gather(batch.index), keys=collectives.gather(batch.keys))
    return _all_keys(method, {"q": own_slice(z["q"])}, {"k": collectives.gather(t["k"])}, whole)


STANDARD = Standard(
    build,
    formula,
    samples=IMAGES,
    constructions=(
        Construction("the queue of all ranks on every rank", _all_keys, formula, True),
        Construction("chance by a key's place in the gathered queue", _places, formula, False),
        Construction("the own rank's part of the queue only", _own_part, formula, False),
        Construction("whole loss on every rank, own slice", _on_every_rank, formula, False),
    ),
    held=held,
    remembered=remembered,
)
