"""Counter-based random numbers as tensors, on any device: the bits of data/counter_rng.py. Loads no numba.

torch has no uint64 arithmetic, but int64 wraps in the same way; only its right shifts repeat the sign bit, and are made
logical here.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB
UNIT = 1.0 / (1 << 53)  # of 53 random bits, as many as a float64 in [0, 1) holds
STEP_SALT = 0x5851F42D4C957F2D  # keeps the keys of steps apart from those of epochs
# Places, the first below the keys of samples. Each is used once in the project.
NETWORK = 0x6E6574  # layers of networks, methods/networks/keyed_layers.py
PARTNERS = 0x706169  # methods/partners.py
KMEANS = 0x6B6D65  # the first rows of k-means, below their indices, methods/clusters/kmeans.py


def keys(seed: int, epoch: int, index: Tensor, views: int) -> Tensor:
    """(N,) int64 sample indices -> (N, views) int64: the bits of `key` for each view of each sample."""
    state = mix_batch(torch.tensor(as_int64(seed), device=index.device))
    state = mix_batch(mix_batch(state ^ epoch) ^ index)  # (N,)
    return mix_batch(state[:, None] ^ torch.arange(views, device=index.device))


def sample_keys(seed: int, step: int, names: Tensor) -> Tensor:
    """(N,) int64 names of samples -> (N,) int64: each one's key in this step, which no view's key is equal to but by
    chance."""
    return mix_batch(names ^ as_int64(_mix(_mix(seed ^ STEP_SALT) ^ step)))


def child(keys: Tensor, *places: int | Tensor) -> Tensor:
    """int64 keys -> int64: those of a place below each, and of a place below that. A place is a constant of
    this file, or a number that counts what is drawn there, broadcast against the keys."""
    for place in places:
        # An int is mixed on the host: a tensor of it would be copied to the device in every step.
        keys = mix_batch(keys ^ (mix_batch(place) if isinstance(place, Tensor) else as_int64(_mix(place))))
    return keys


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


def _mix(state: int) -> int:
    """`mix` of one number, from 0 to 2**64 - 1."""
    x = (state + GOLDEN) % 2**64
    x = (x ^ (x >> 30)) * MULTIPLIER_1 % 2**64
    x = (x ^ (x >> 27)) * MULTIPLIER_2 % 2**64
    return x ^ (x >> 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Shifts int64 to the right and brings in zeros; torch's own shift repeats the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def as_int64(x: int) -> int:
    """The int64 with the bits of this uint64."""
    return (int(x) + 2**63) % 2**64 - 2**63
