"""Counter-based random numbers: a pure function of (seed, epoch, sample index, view) and a draw number.

splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014): draw k of a key is the
k-th output of a splitmix64 generator whose state starts at the key. Two forms with the same bits: scalars for compiled
loops, and tensors for accelerators, where int64 wraps as uint64 does, and only the shifts have to be made logical.
"""

import numpy as np
import torch
from torch import Tensor

from kilobatch.data.numba_jit import Real, Whole, exact

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST = np.uint64(0xBF58476D1CE4E5B9)
SECOND = np.uint64(0x94D049BB133111EB)
UNIT = 1.0 / (1 << 53)  # 53 random bits: all that a float64 below one holds


@exact
def mix(state: Whole) -> Whole:
    """The splitmix64 output that follows this state."""
    x = np.uint64(state) + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * FIRST
    x = (x ^ (x >> np.uint64(27))) * SECOND
    return x ^ (x >> np.uint64(31))


@exact
def key(seed: Whole, epoch: Whole, index: Whole, view: Whole) -> Whole:
    """The key of one view of one sample.

    Called from Python, compiled functions give a plain int and take one for an int64: pass a key on as np.uint64(key).
    """
    return mix(mix(mix(mix(np.uint64(seed)) ^ np.uint64(epoch)) ^ np.uint64(index)) ^ np.uint64(view))


@exact
def uniform(key: Whole, draw: Whole) -> Real:
    """Draw number `draw` of this key, in [0, 1)."""
    return np.float64(mix(np.uint64(key) + np.uint64(draw) * GOLDEN) >> np.uint64(11)) * UNIT


def keys(seed: int, epoch: int, index: Tensor, views: int) -> Tensor:
    """(N,) int64 sample indices -> (N, views) int64, the bits of `key` of each view of each sample."""
    state = mixes(torch.tensor(signed(seed), device=index.device))
    state = mixes(mixes(state ^ epoch) ^ index)  # (N,)
    return mixes(state[:, None] ^ torch.arange(views, device=index.device))


def uniforms(keys: Tensor, draws: Tensor) -> Tensor:
    """Draws of keys, broadcast against each other, both int64 -> float64 in [0, 1), the bits of `uniform`."""
    return shift(mixes(keys + draws * signed(GOLDEN)), 11).double() * UNIT


def mixes(state: Tensor) -> Tensor:
    """`mix` of each element."""
    x = state + signed(GOLDEN)
    x = (x ^ shift(x, 30)) * signed(FIRST)
    x = (x ^ shift(x, 27)) * signed(SECOND)
    return x ^ shift(x, 31)


def shift(x: Tensor, bits: int) -> Tensor:
    """The logical right shift of int64, whose own shift repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(x: Whole) -> int:
    """The int64 that has the bits of this uint64."""
    return (int(x) + 2**63) % 2**64 - 2**63
