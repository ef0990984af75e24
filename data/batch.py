"""The batch that a loader yields and a method reads: tensors with the sample axis first, which are cut alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kilobatch.data.beton_layout import ArrayForm
from kilobatch.data.tensor_rng import sample_keys


class ViewShape(Protocol):
    """How many views a group has of each image, and the pixels of their sides: of the options of views."""

    count: int
    size: int


@dataclass(frozen=True)
class Clock:
    """Where in the training a step is: the same on every rank. step: from 0; steps: of the training; per_epoch: of an
    epoch.

    A method reads it in arrange, loss and update, not in embed: a number that changes there would have torch.compile
    start anew at every step.
    """

    step: int
    steps: int
    per_epoch: int

    @property
    def epoch(self) -> float:
        """Epochs that are done when the step begins, with their fraction."""
        return self.step / self.per_epoch

    @property
    def progress(self) -> float:
        """The share of the training that is done when the step begins, from 0 to 1."""
        return self.step / self.steps

    @property
    def after(self) -> float:
        """The share of the training that is done after the step."""
        return (self.step + 1) / self.steps


START = Clock(0, 1, 1)
HALF_WAY = Clock(1, 4, 2)  # after this step half of the training is done


@dataclass(frozen=True)
class Batch:
    """This rank's n samples of one global batch; n is the same on every rank.

    views: of each group of views (n, V, 3, H, W) floating, normalised; () where the samples are no images, as in
    batches that are made by hand: a loader's always have views. index: (n,) int64, the samples' places in the data set.
    label: (n,) int64, -1 for a sample without one. keys: (n,) int64, each sample's chance in this step, by which a
    method draws (data/tensor_rng.py); fields: further tensors by name, (n, ...), of the data or of Method.arrange.
    """

    views: tuple[Tensor, ...]
    index: Tensor
    label: Tensor
    keys: Tensor
    clock: Clock = START
    fields: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    def chunks(self, count: int) -> list["Batch"]:
        """Splits into equal parts, in order; all of a sample stays together. `count` has to divide len(self)."""
        size, rest = divmod(len(self), count)
        assert not rest, "the recipe's validation has made sure of it"
        return [self._each(lambda x, at=k * size: x[at : at + size]) for k in range(count)]

    def first(self, count: int) -> "Batch":
        """The first samples alone."""
        return self._each(lambda x: x[:count])

    def rows(self, which: Tensor) -> "Batch":
        """The samples that a mask or their numbers name."""
        return self._each(lambda x: x[which])

    def to(self, dtype: torch.dtype) -> "Batch":
        """With views of this type."""
        return self.replaced(views=tuple(x.to(dtype) for x in self.views))

    def on(self, device: torch.device) -> "Batch":
        """With all tensors on this device."""
        return self._each(lambda x: x.to(device))

    def replaced(self, **changes: Any) -> "Batch":
        """With other values of these attributes."""
        return replace(self, **changes)

    def with_fields(self, **fields: Tensor) -> "Batch":
        """With these fields besides those that it has."""
        return replace(self, fields={**self.fields, **fields})

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        fields = {name: change(x) for name, x in self.fields.items()}
        index, label, keys = change(self.index), change(self.label), change(self.keys)
        return Batch(tuple(change(x) for x in self.views), index, label, keys, self.clock, fields)


def blank(samples: int, groups: Sequence[ViewShape], fields: Sequence[ArrayForm] = ()) -> Batch:
    """A batch of the shapes that these options make, with zeros: the one place that knows them without any data.

    fields: the form of each, of one sample: as the note of a .beton states it.
    """
    views = [torch.zeros(samples, group.count, 3, group.size, group.size) for group in groups]
    more = {form.name: torch.zeros(samples, *form.shape, dtype=getattr(torch, form.dtype.name)) for form in fields}
    label = torch.zeros(samples, dtype=torch.int64)
    return make_batch(views, torch.arange(samples), label, clock=HALF_WAY, fields=more)


def make_batch(
    views: Tensor | Sequence[Tensor],
    index: Tensor | None = None,
    label: Tensor | None = None,
    *,
    seed: int = 0,
    clock: Clock = START,
    fields: Mapping[str, Tensor] | None = None,
) -> Batch:
    """A batch of views that were made elsewhere. index: None: 0 to n - 1; label: None: none has one."""
    groups = (views,) if isinstance(views, Tensor) else tuple(views)
    samples = next(iter((*groups, *(fields or {}).values())))
    if index is None:
        index = torch.arange(len(samples), device=samples.device)
    if label is None:
        label = torch.full_like(index, -1)
    return Batch(groups, index, label, sample_keys(seed, clock.step, index), clock, fields or {})
