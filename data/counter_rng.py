"""Counter-based random numbers: a pure function of (seed, epoch, sample index, view) and a draw number.

splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014): draw k of a key is the
k-th output of a splitmix64 generator whose state starts at the key. These are scalars for compiled loops;
data/tensor_rng.py has the same bits as tensors.
"""

import numpy as np

from kilobatch.data.numba_jit import Integer, Real, exact

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
UNIT = 1.0 / (1 << 53)  # of 53 random bits, as many as a float64 in [0, 1) holds


@exact
def mix(state: Integer) -> Integer:
    """The splitmix64 output that follows this state."""
    x = np.uint64(state) + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * MULTIPLIER_1
    x = (x ^ (x >> np.uint64(27))) * MULTIPLIER_2
    return x ^ (x >> np.uint64(31))


@exact
def key(seed: Integer, epoch: Integer, index: Integer, view: Integer) -> Integer:
    """The key of one view of one sample.

    Called from Python, it returns a plain int, which compiled functions take for an int64: pass np.uint64(key) on.
    """
    return mix(mix(mix(mix(np.uint64(seed)) ^ np.uint64(epoch)) ^ np.uint64(index)) ^ np.uint64(view))


@exact
def uniform(key: Integer, draw: Integer) -> Real:
    """Draw number `draw` of this key, in [0, 1)."""
    return np.float64(mix(np.uint64(key) + np.uint64(draw) * GOLDEN) >> np.uint64(11)) * UNIT


@exact
def part_key(key: Integer, draw: Integer) -> Integer:
    """The key of a part of what this key stands for: all bits of its draw number `draw`."""
    return mix(np.uint64(key) + np.uint64(draw) * GOLDEN)
