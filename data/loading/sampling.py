"""Order of the samples and their division into batches: pure functions, the same on every machine and world size."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.beton import read_labels
from kilobatch.data.errors import UserError
from kilobatch.data.loading.options import OrderOptions, order_problem

Indices = NDArray[np.int64]
# What is drawn besides an epoch's shuffle, each from words of its own.
TAIL, CLASSES_OF_TURNS, IMAGES_OF_TURNS, CLASSES_OF_BATCHES, IMAGES_OF_BATCHES = range(1, 6)
ROUNDING = 1e-6  # images: powers may differ by their last bits between machines


def epoch_order(seed: int, epoch: int, samples: int) -> Indices:
    """(samples,) all sample indices, shuffled anew for each (seed, epoch), both non-negative."""
    return _shuffles(1, samples, seed, epoch)[0]


def balanced_order(seed: int, epoch: int, labels: Indices, length: int) -> Indices:
    """(length,) places in `labels` (n,): in every run of as many as there are classes each class comes once, in an
    order of its own. A class's images are shuffled anew when all of them have come."""
    members = images_by_class(labels)
    turns = -(-length // len(members))
    columns = []
    for label, places in members.items():
        rounds = _shuffles(-(-turns // len(places)), len(places), seed, epoch, IMAGES_OF_TURNS, label)
        columns.append(places[rounds.ravel()[:turns]])
    classes = _shuffles(turns, len(members), seed, epoch, CLASSES_OF_TURNS)
    return np.take_along_axis(np.stack(columns, 1), classes, 1).ravel()[:length]


def class_batches(seed: int, epoch: int, labels: Indices, steps: int, classes: int, images: int) -> Indices:
    """(steps * classes * images,) places in `labels` (n,): batches of `classes` different classes, and of `images`
    images of each, side by side.

    Classes come in rounds of whole batches, and a class's images in rounds of whole batches' shares, so that none comes
    twice in a batch; what a round leaves over is another part each time. A class of fewer than `images` images has some
    of them several times.
    """
    members = images_by_class(labels)
    chosen = _draws(steps, classes, len(members), seed, epoch, CLASSES_OF_BATCHES).ravel()  # places among the classes
    by_class = np.argsort(chosen, kind="stable")
    visits = np.bincount(chosen, minlength=len(members))
    order, end = np.empty((len(chosen), images), np.int64), 0
    for (label, places), count in zip(members.items(), visits.tolist(), strict=True):
        visited = by_class[end : (end := end + count)]
        order[visited] = places[_draws(count, images, len(places), seed, epoch, IMAGES_OF_BATCHES, label)]
    return order.ravel()


def long_tail(labels: Indices, ratio: float, form: Literal["exponential", "step"], seed: int) -> Indices:
    """The samples of a long-tailed part, ascending: options.LongTailed says which. labels: (samples,)."""
    members = images_by_class(labels)
    place, last = np.arange(len(members)), max(1, len(members) - 1)
    shares = ratio ** -(place / last if form == "exponential" else (place >= len(members) // 2).astype(float))
    counts = np.array([len(places) for places in members.values()])
    most = np.floor((counts / shares).min() + ROUNDING)
    kept = np.maximum(1, np.floor(most * shares + ROUNDING).astype(np.int64)).tolist()
    shuffled = (places[_shuffles(1, len(places), seed, label, TAIL)[0]] for label, places in members.items())
    return np.sort(np.concatenate([places[:count] for places, count in zip(shuffled, kept, strict=True)]))


def sample_names(order: Indices, samples: int) -> Indices:
    """Names for an epoch's order of sample indices: index + occurrence x samples, so that a sample that comes again is
    drawn for anew. samples: of the file."""
    by_index = np.argsort(order, kind="stable")
    ordered = order[by_index]
    first = np.searchsorted(ordered, ordered)  # of the places of the same index
    names = np.empty_like(order)
    names[by_index] = ordered + (np.arange(len(order)) - first) * samples
    return names


def rank_batches(order: Indices, batch: int, rank: int, world: int) -> Indices:
    """(steps, batch // world) this rank's samples of each step; `batch` is the global batch, a multiple of `world`.

    Step s takes the s-th run of `batch` samples, and rank r the r-th of its `world` equal parts: the ranks' parts in
    rank order are the global batch, for any number of ranks. The last, incomplete batch is dropped.
    """
    steps = len(order) // batch
    return order[: steps * batch].reshape(steps, world, batch // world)[:, rank]


def rank_block(samples: int, rank: int, world: int) -> Indices:
    """This rank's contiguous part of all samples in their own order; the parts differ by at most one in length."""
    return np.arange(samples * rank // world, samples * (rank + 1) // world)


class Sampler:
    """The samples of each epoch, in order, and their names: the same on every rank.

    samples: of the file. used: those that are trained on, ascending; None: all. options: the recipe's data.order, whose
    long-tailed part is in `used` already; unlabelled: how many of the samples used have no label; order: of a method,
    the epoch's sample indices or None for the recipe's order. length: samples of an epoch.
    Raises UserError where the options do not fit the batch or the labels.
    """

    def __init__(
        self,
        beton: Path,
        samples: int,
        used: Indices | None,
        seed: int,
        batch: int,
        options: OrderOptions | None = None,
        unlabelled: int = 0,
        order: Callable[[int], Indices | None] | None = None,
    ):
        self.samples, self.used, self.seed, self.batch, self.order = samples, used, seed, batch, order
        self.length = (samples if used is None else len(used)) // batch * batch
        self.options = options if options is not None and options.by_class else None
        self.labels = np.zeros(0, np.int64)  # of the samples used, where an order is made of them
        if self.options is not None:
            labels = read_labels(beton)
            self.labels = labels if used is None else labels[used]
            if problem := order_problem(options, batch, len(np.unique(self.labels)), unlabelled):
                raise UserError(problem)

    def epoch(self, epoch: int) -> tuple[Indices, Indices]:
        """Sample indices and names, (length,) each or longer by less than a batch. Raises ValueError for an order of
        the method's that is too short, or that names other samples than are trained on."""
        given = None if self.order is None else self.order(epoch)
        if given is not None:
            order = self._checked(np.asarray(given), epoch)
            return order, sample_names(order, self.samples)
        places = self._places(epoch)
        order = places if self.used is None else self.used[places]
        return order, order if self.options is None else sample_names(order, self.samples)

    def _places(self, epoch: int) -> Indices:
        if self.options is None:
            return epoch_order(self.seed, epoch, self.samples if self.used is None else len(self.used))
        if (images := self.options.images_per_class) is None:
            return balanced_order(self.seed, epoch, self.labels, self.length)
        steps = self.length // self.batch
        return class_batches(self.seed, epoch, self.labels, steps, self.batch // images, images)

    def _checked(self, order: NDArray[np.generic], epoch: int) -> Indices:
        said = f"the method's epoch_order({epoch})"
        if order.ndim != 1 or order.dtype.kind not in "iu":
            raise ValueError(f"{said} is {order.dtype} of shape {order.shape}; return sample indices, (n,) integers")
        if len(order) < self.length:
            raise ValueError(f"{said} has {len(order):,} samples; return at least the {self.length:,} of an epoch")
        order = order[: self.length].astype(np.int64)
        allowed = (order >= 0) & (order < self.samples) if self.used is None else np.isin(order, self.used)
        if not allowed.all():
            wrong, count = int(order[~allowed][0]), self.samples if self.used is None else len(self.used)
            raise ValueError(f"{said} has sample {wrong}, which is none of the {count:,} that are trained on")
        return order


def images_by_class(labels: Indices) -> dict[int, Indices]:
    """The places in `labels`, ascending, of each class that has any."""
    # NumPy sorts numbers of 16 bits by their digits, several times as fast as those of 64.
    small = len(labels) > 0 and labels.min() >= 0 and labels.max() < 2**16
    places = np.argsort(labels.astype(np.uint16) if small else labels, kind="stable")
    ordered = labels[places]
    first = np.append(True, ordered[1:] != ordered[:-1])
    return dict(zip(ordered[first].tolist(), np.split(places, np.flatnonzero(first)[1:]), strict=True))


def _draws(draws: int, each: int, items: int, *key: int) -> Indices:
    """(draws, each) numbers below `items`: without repetition within a draw where there are enough items."""
    whole = items // each  # draws of a shuffle
    if whole:
        return _shuffles(-(-draws // whole), items, *key)[:, : whole * each].reshape(-1, each)[:draws]
    shuffles = -(-each // items)
    return _shuffles(draws * shuffles, items, *key).reshape(draws, -1)[:, :each]


def _shuffles(rows: int, items: int, *key: int) -> Indices:
    """(rows, items): in each row all numbers below `items`, in an order by the key.

    Sorts a counter-based generator's raw words (Philox; Salmon et al.: Parallel random numbers: as easy as 1, 2, 3,
    SC 2011): numpy promises not to change their stream between versions, which it does not for its own shuffle.
    """
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(rows * items)
    return np.argsort(words.reshape(rows, items), axis=1, kind="stable").astype(np.int64)
