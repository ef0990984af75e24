"""Counter-based random numbers: a pure function of (seed, epoch, sample index, view) and a draw number.

splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014): draw k of a key is the
k-th output of a splitmix64 generator whose state starts at the key. Two forms with the same bits: scalars for compiled
loops, and tensors for accelerators. torch has no uint64 arithmetic, but int64 wraps in the same way; only its right
shifts repeat the sign bit, and are made logical here.
"""

import numpy as np
import torch
from torch import Tensor

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


def keys(seed: int, epoch: int, index: Tensor, views: int) -> Tensor:
    """(N,) int64 sample indices -> (N, views) int64: the bits of `key` for each view of each sample."""
    state = mix_batch(torch.tensor(as_int64(seed), device=index.device))
    state = mix_batch(mix_batch(state ^ epoch) ^ index)  # (N,)
    return mix_batch(state[:, None] ^ torch.arange(views, device=index.device))


def uniforms(keys: Tensor, draws: Tensor) -> Tensor:
    """int64 keys and draw numbers, broadcast against each other -> float64 in [0, 1), the bits of `uniform`."""
    return shift_right(mix_batch(keys + draws * as_int64(GOLDEN)), 11).double() * UNIT


def part_keys(keys: Tensor, draws: Tensor) -> Tensor:
    """int64 keys and draw numbers, broadcast against each other -> int64, the bits of `part_key`."""
    return mix_batch(keys + draws * as_int64(GOLDEN))


def mix_batch(state: Tensor) -> Tensor:
    """`mix` of each element."""
    x = state + as_int64(GOLDEN)
    x = (x ^ shift_right(x, 30)) * as_int64(MULTIPLIER_1)
    x = (x ^ shift_right(x, 27)) * as_int64(MULTIPLIER_2)
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Shifts int64 to the right and brings in zeros; torch's own shift repeats the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def as_int64(x: Integer) -> int:
    """The int64 with the bits of this uint64."""
    return (int(x) + 2**63) % 2**64 - 2**63
