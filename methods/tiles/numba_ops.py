"""Compiled passes over a tile, fp32 on a CPU, for tiles/torch_ops.py: each reads a tile once and needs no temporary.

The exponential is written out so that the compiler can vectorise it: e^x = 2^n e^r with n = round(x / ln 2) and
|r| <= ln 2 / 2, where e^r is a polynomial of degree 6 and 2^n is made of exponent bits. Its error is below 1 ulp. x may
be at most 88; the result is 0 below -87.7, and NaN for NaN.
"""

from typing import Any

import numba
import numpy as np

from kilobatch.data.numba_jit import COMMON, Floats

f32 = np.float32
LOG2_E = f32(1.4426950408889634)
LN_2 = f32(0.693145751953125), f32(1.42860677e-6)  # ln 2 as a sum; n times the first, which has 16 bits, is exact
ONE, C2, C3, C4 = f32(1), f32(0.49999994), f32(0.16666521), f32(0.041668389)  # of the minimax polynomial
C5, C6 = f32(0.00836871), f32(0.001381461)
LOWEST = f32(-88)  # gives n = -127, whose exponent bits are all zeros: the number 0
BIAS, FIRST_EXPONENT_BIT = f32(127), f32(2**23)

# Neither may assume that there is no NaN: a NaN has to stay visible. The exponential may not be reassociated, since the
# two parts of LN_2 would be added up; the sums must be, to become sums of vectors. (The compiler flags belong to each
# function: see data/numba_jit.py.)
ORDERED: dict[str, Any] = {**COMMON, "fastmath": {"contract"}}
REASSOCIATED: dict[str, Any] = {**COMMON, "fastmath": {"contract", "reassoc"}}


@numba.njit(**ORDERED)
def exponential(x: np.float32) -> np.float32:
    x = LOWEST if x < LOWEST else x
    n = np.rint(x * LOG2_E)
    r = x - n * LN_2[0] - n * LN_2[1]
    power_of_two = np.int32((n + BIAS) * FIRST_EXPONENT_BIT).view(np.float32)
    return power_of_two * (ONE + r * (ONE + r * (C2 + r * (C3 + r * (C4 + r * (C5 + r * C6))))))


@numba.njit(**REASSOCIATED)
def exp_and_sum(s: Floats, rows: Floats, columns: Floats | None) -> None:
    for i in range(s.shape[0]):
        total = f32(0)
        for j in range(s.shape[1]):
            e = exponential(s[i, j])
            s[i, j] = e
            total += e
            if columns is not None:
                columns[j] += e
        rows[i] += total


@numba.njit(**REASSOCIATED)
def exp_and_weigh(s: Floats, rows: Floats, columns: Floats) -> None:
    for i in range(s.shape[0]):
        for j in range(s.shape[1]):
            s[i, j] = exponential(s[i, j]) * (rows[i] + columns[j])
