"""Order of the samples and their division into batches: pure functions, the same on every machine and world size."""

import numpy as np
from numpy.typing import NDArray


def epoch_order(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """(samples,) all sample indices, shuffled anew for each (seed, epoch), both non-negative.

    Sorts a counter-based generator's raw words (Philox; Salmon et al.: Parallel random numbers: as easy as 1, 2, 3,
    SC 2011): numpy promises not to change their stream between versions, which it does not for its own shuffle.
    """
    words = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(samples)
    return np.argsort(words, kind="stable").astype(np.int64)


def rank_batches(order: NDArray[np.int64], batch: int, rank: int, world: int) -> NDArray[np.int64]:
    """(steps, batch // world) this rank's samples of each step; `batch` is the global batch, a multiple of `world`.

    Step s takes the s-th run of `batch` samples, and rank r the r-th of its `world` equal parts: the ranks' parts in
    rank order are the global batch, for any number of ranks. The last, incomplete batch is dropped.
    """
    steps = len(order) // batch
    return order[: steps * batch].reshape(steps, world, batch // world)[:, rank]


def rank_block(samples: int, rank: int, world: int) -> NDArray[np.int64]:
    """This rank's contiguous part of all samples in their own order; the parts differ by at most one in length."""
    return np.arange(samples * rank // world, samples * (rank + 1) // world)
