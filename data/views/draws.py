"""Draws the values of a view's key within the ranges of its plan; data/views/columns.py numbers both."""

import numpy as np
import torch
from torch import Tensor

from kilobatch.data.counter_rng import uniform
from kilobatch.data.numba_jit import Floats, Integer, Real, exact
from kilobatch.data.tensor_rng import uniforms
from kilobatch.data.views.columns import CROP, FIRST_DRAW, HIGH, LOW, VALUES


@exact
def draw_value(key: Integer, plan: Floats, value: Integer) -> Real:
    """Draws value number `value` of this key."""
    low, high = np.float64(plan[LOW + value]), np.float64(plan[HIGH + value])
    return low + (high - low) * uniform(key, FIRST_DRAW + value)


def draw_values(keys: Tensor, plans: Tensor) -> Tensor:
    """(N, V) keys, (V, COLUMNS) plans -> (N, V, VALUES) float64: the bits of `draw_value`."""
    draws = torch.arange(FIRST_DRAW, FIRST_DRAW + VALUES, device=keys.device)
    low, high = plans[:, LOW:HIGH].double(), plans[:, HIGH:CROP].double()
    return low + (high - low) * uniforms(keys[:, :, None], draws)
