"""Draws the part of an image that a view shows, and whether it is flipped."""

import math

import numpy as np

from kilobatch.data.counter_rng import uniform
from kilobatch.data.numba_jit import Floats, Integer, exact
from kilobatch.data.views.columns import AREA_HIGH, AREA_LOW, CROP, FLIP, FLIP_DRAW, RATIO_HIGH, RATIO_LOW

ATTEMPTS = 10
CropBox = tuple[Integer, Integer, Integer, Integer, bool]


@exact
def draw_flip(key: Integer, plan: Floats) -> bool:
    return uniform(key, FLIP_DRAW) < plan[FLIP]


@exact
def crop_box(key: Integer, height: Integer, width: Integer, plan: Floats) -> CropBox:
    """(top, left, height, width) in pixels of the image, and whether to flip it horizontally.

    As torchvision's RandomResizedCrop: ten attempts at an area uniform in its range and a ratio uniform in its
    logarithm; when none fits, the largest central part whose ratio is allowed.
    """
    rows, columns = np.int64(height), np.int64(width)
    flip = draw_flip(key, plan)
    if plan[CROP] == 0:
        return np.int64(0), np.int64(0), rows, columns, flip

    area_low, area_high = np.float64(plan[AREA_LOW]), np.float64(plan[AREA_HIGH])
    ratio_low, ratio_high = np.float64(plan[RATIO_LOW]), np.float64(plan[RATIO_HIGH])
    log_low, log_high = math.log(ratio_low), math.log(ratio_high)
    for attempt in range(ATTEMPTS):
        draw = 4 * attempt
        area = rows * columns * (area_low + (area_high - area_low) * uniform(key, draw))
        ratio = math.exp(log_low + (log_high - log_low) * uniform(key, draw + 1))
        w = np.int64(np.rint(math.sqrt(area * ratio)))
        h = np.int64(np.rint(math.sqrt(area / ratio)))
        if 0 < w <= columns and 0 < h <= rows:
            top = np.int64(uniform(key, draw + 2) * (rows - h + 1))
            left = np.int64(uniform(key, draw + 3) * (columns - w + 1))
            return top, left, h, w, flip

    w, h = columns, rows
    if columns < ratio_low * rows:
        h = np.int64(np.rint(columns / ratio_low))
    elif columns > ratio_high * rows:
        w = np.int64(np.rint(rows * ratio_high))
    return (rows - h) // 2, (columns - w) // 2, h, w, flip
