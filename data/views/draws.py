"""Draws the values of a view's key within the ranges of its plan; data/views/columns.py numbers both."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kilobatch.data.counter_rng import uniform
from kilobatch.data.numba_jit import Floats, Integer, Real, exact
from kilobatch.data.tensor_rng import uniforms
from kilobatch.data.views.columns import CROP, FIRST_DRAW, HIGH, LOW, TIED, VALUES


@exact
def draw_all(key: Integer, first: Integer, plan: Floats) -> NDArray[np.float64]:
    """(VALUES,) all values of a view. first: the key of its group's first view, which draws those that are tied."""
    drawn = np.empty(VALUES, np.float64)
    for value in range(VALUES):
        drawn[value] = draw_value(first if plan[TIED + value] > 0 else key, plan, value)
    return drawn


@exact
def draw_value(key: Integer, plan: Floats, value: Integer) -> Real:
    """Draws value number `value` of this key."""
    low, high = np.float64(plan[LOW + value]), np.float64(plan[HIGH + value])
    return low + (high - low) * uniform(key, FIRST_DRAW + value)


def draw_values(keys: Tensor, plans: Tensor) -> Tensor:
    """(N, V) keys of a group's views, (V, COLUMNS) plans -> (N, V, VALUES) float64: the bits of `draw_all`."""
    draws = torch.arange(FIRST_DRAW, FIRST_DRAW + VALUES, device=keys.device)
    low, high = plans[:, LOW:HIGH].double(), plans[:, HIGH:CROP].double()
    tied = (plans[:, TIED : TIED + VALUES] > 0).to(keys.device)
    own = torch.where(tied, keys[:, :1, None], keys[:, :, None])  # (N, V, VALUES)
    return low + (high - low) * uniforms(own, draws)
