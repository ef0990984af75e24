"""Standards, which methods are compared with: the paper's formula in the plainest code, and some constructions.

The standard of methods/papers/<name>.py is STANDARD in methods/parity/formulas/<name>.py; that of another form of it,
with other options, is in <name>_<form>.py. A formula uses nothing of the method's own loss, on purpose: no tiles, no
gradients in closed form, nothing of methods.losses.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.options import Mode

Loss = Callable[[Method, Tensors, Tensors, Batch], Tensor]  # method, z, t, batch -> 0-dim
Arrange = Callable[[Method, Batch], Batch]
TEMPERATURE = 0.2
MethodT = TypeVar("MethodT", bound=Method)


def no_labels(samples: int) -> Tensor:
    """Labels (samples,) int64 for a method that reads none."""
    return torch.zeros(samples, dtype=torch.int64)


def no_fields(samples: int) -> dict[str, Tensor]:
    """Fields for a method that needs none."""
    return {}


def by_method(method: Method, batch: Batch) -> Batch:
    """The batch as the method itself arranges it."""
    return method.arrange(batch)


@dataclass(frozen=True)
class GroupShape:
    """A group of views: how many of each sample, and the pixels of their sides."""

    count: int = 2
    size: int = 12


@dataclass(frozen=True)
class Construction:
    """A way to compute a loss on several ranks. loss: of one rank's samples, as `arrange` arranges them; formula: the
    loss of all samples in one process, which it should equal; right: True if the two have the same gradient."""

    name: str
    loss: Loss
    formula: Loss
    right: bool
    arrange: Arrange = by_method


@dataclass(frozen=True)
class Standard:
    """The reference for a method. build: the method on a small network, its weights by torch's random state, its norms
    in the given mode.

    formula: the loss of all samples in one process. held: the rows (m, D) of a rank's memory; remembered: the rows of
    all ranks after one update, in any order, computed by plain code in one process from the method before the update,
    z, t and the batch. groups: of views; labels: (samples,) int64, of all samples, from their number; fields: (samples,
    ...) each, likewise.
    """

    build: Callable[[Mode], Method]
    formula: Loss
    constructions: tuple[Construction, ...] = ()
    samples: int = 24  # of the global batch
    groups: tuple[GroupShape, ...] = (GroupShape(),)
    labels: Callable[[int], Tensor] = no_labels
    fields: Callable[[int], Mapping[str, Tensor]] = no_fields
    held: Callable[[Method], Tensor] | None = None
    remembered: Loss | None = None


def own_slice(z: Tensor) -> Tensor:
    """A gather whose backward gives each rank the gradient of its own loss alone."""
    parts = list(collectives.gather(z.detach()).chunk(collectives.world_size()))
    parts[collectives.rank()] = z
    return torch.cat(parts)


def no_gradient(z: Tensor) -> Tensor:
    """A gather without gradient."""
    return collectives.gather(z.detach())


def without_bias(method: MethodT, name: str) -> MethodT:
    """The method with a last linear layer's bias at 0. With fixed norms it would exceed all that an untrained network
    gives, so that outputs all but agree, and a gradient would be a small difference of large parts."""
    nn.init.zeros_(method.get_parameter(name))
    return method


def queue_constructions(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], z: str, t: str, held: Callable[[Method], Tensor]
) -> tuple[Construction, ...]:
    """Ways to compute loss(z, t, keys) against a sharded queue, right and wrong. The formula is the loss against what
    is held, which is the whole queue in one process. z, t: the names of the method's outputs."""

    def whole(method: Method) -> Tensor:
        return collectives.gather(held(method))

    def formula(method: Method, outputs: Tensors, targets: Tensors, batch: Batch) -> Tensor:
        return loss(outputs[z], targets[t], held(method))

    def all_keys(method: Method, outputs: Tensors, targets: Tensors, batch: Batch) -> Tensor:
        return loss(outputs[z], targets[t], whole(method))

    def on_every_rank(method: Method, outputs: Tensors, targets: Tensors, batch: Batch) -> Tensor:
        return loss(own_slice(outputs[z]), collectives.gather(targets[t]), whole(method))

    return (
        Construction("the queue of all ranks on every rank", all_keys, formula, True),
        Construction("the own rank's part of the queue only", formula, formula, False),
        Construction("whole loss on every rank, own slice", on_every_rank, formula, False),
    )
