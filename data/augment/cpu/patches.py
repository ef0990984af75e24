"""Jigsaw views on CPUs whose patches are coloured one by one: PIRL's."""

import numpy as np

from kilobatch.data.augment.cpu.augment import augment
from kilobatch.data.counter_rng import part_key, uniform
from kilobatch.data.numba_jit import Bytes, Floats, Integer, exact, fast
from kilobatch.data.views.columns import FLIP_DRAW, GRID, JIGSAW_DRAW, PATCH, PATCH_DRAW, PATCH_FLIP, PATCHES
from kilobatch.data.views.draws import draw_all


@fast
def augment_patches(image: Bytes, key: Integer, plan: Floats, out: Floats, scratch: Floats) -> None:
    """A jigsaw of image (S, S, 3) -> out (3, S, S), as data/augment/jigsaw.py's `augment_by_patch` makes it."""
    side = np.int64(plan[PATCH])
    patch, coloured = np.empty((side, side, 3), np.uint8), np.empty((3, side, side), np.float32)
    cells = shuffled_cells(key)
    out[:] = 0
    for place in range(PATCHES):
        own = part_key(key, PATCH_DRAW + place)
        top, left = patch_corner(key, place, cells[place], image.shape[0], side)
        part = image[top : top + side, left : left + side]
        if uniform(own, FLIP_DRAW) < plan[PATCH_FLIP]:
            patch[:] = part[:, ::-1]
        else:
            patch[:] = part
        augment(patch, draw_all(own, own, plan), plan, coloured, scratch)
        y, x = place // GRID * side, place % GRID * side
        out[:, y : y + side, x : x + side] = coloured


@exact
def shuffled_cells(key: Integer) -> np.ndarray:
    """(9,) the cell that the patch at each place comes from."""
    draws = np.empty(PATCHES, np.float64)
    for place in range(PATCHES):
        draws[place] = uniform(key, JIGSAW_DRAW + place)
    return np.argsort(draws)


@exact
def patch_corner(key: Integer, place: Integer, cell: Integer, size: Integer, side: Integer) -> tuple[Integer, Integer]:
    """Top and left, in pixels of the view, of the patch at a place: anywhere in its cell."""
    width = size // GRID
    down = np.int64(uniform(key, JIGSAW_DRAW + PATCHES + place) * (width - side + 1))
    across = np.int64(uniform(key, JIGSAW_DRAW + 2 * PATCHES + place) * (width - side + 1))
    return cell // GRID * width + down, cell % GRID * width + across
