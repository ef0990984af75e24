"""What a method is held to: the paper's formula in the plainest code, and constructions known to be wrong.

Those of methods/<name>.py stand in methods/parity/formulas/<name>.py, as STANDARD, and another form's, by its options,
in <name>_<form>.py; independent of the method's own loss on purpose: neither tiles, nor closed gradients, nor
methods.losses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kilobatch.methods import collectives as across
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.options import Mode

Loss = Callable[[Method, Tensors, Tensors], Tensor]  # method, z, t -> 0-dim
TEMPERATURE = 0.2


def no_labels(samples: int) -> Tensor:
    """(samples,) int64: what a method that reads no labels is given."""
    return torch.zeros(samples, dtype=torch.int64)


@dataclass(frozen=True)
class Construction:
    """loss: of one rank's samples; formula: what it should be, of all samples in one process; right: whether it is."""

    name: str
    loss: Loss
    formula: Loss
    right: bool


@dataclass(frozen=True)
class Standard:
    """build: the method on a small network, its weights by torch's random state, its norms in this mode.

    formula: of all samples in one process. held: the rows (m, D) that a rank remembers; remembered: those of all ranks
    after one step's update, by plain code from the method before it, z and t, in one process, in any order.
    views: of each sample; labels: of all samples, (samples,) int64, by their number.
    """

    build: Callable[[Mode], Method]
    formula: Loss
    constructions: tuple[Construction, ...] = ()
    samples: int = 16  # of the global batch
    views: int = 2
    labels: Callable[[int], Tensor] = no_labels
    held: Callable[[Method], Tensor] | None = None
    remembered: Callable[[Method, Tensors, Tensors], Tensor] | None = None


def own_slice(z: Tensor) -> Tensor:
    """A gather whose backward gives each rank its own loss's gradient alone."""
    parts = list(across.gather(z.detach()).chunk(across.size()))
    parts[across.rank()] = z
    return torch.cat(parts)


def no_gradient(z: Tensor) -> Tensor:
    return across.gather(z.detach())
