"""Jigsaw views: a view is divided into patches, which are shifted at random and shuffled.

Noroozi, Favaro, 2016, arxiv.org/abs/1603.09246, in the form of Misra, van der Maaten, 2020, arxiv.org/abs/1912.01991
(facebookresearch/vissl, ImgPatchesFromTensor).
"""

import torch
from torch import Tensor

from kilobatch.data.counter_rng import uniforms
from kilobatch.data.views.columns import JIGSAW_DRAW

GRID = 3
PATCHES = GRID * GRID


def patch_side(size: int) -> int:
    """Pixels of a patch's side: 64 for a view of 255 pixels, whose cells have 85; 56 for a view of 224."""
    return size * 64 // 255


def jigsaw(views: Tensor, keys: Tensor) -> Tensor:
    """views (N, 3, S, S) on any device, keys (N,) int64 of the views -> (N, 3, S, S) with nine patches.

    Each cell of a 3x3 grid gives one patch of patch_side(S) pixels, from a random place within the cell. They lie edge
    to edge in a random order in the top left corner; the rest is zeros. Differs from the authors' code in that the
    view is coloured and flipped as a whole, and then divided.
    """
    n, _, size, _ = views.shape
    cell, patch = size // GRID, patch_side(size)
    draws = torch.arange(JIGSAW_DRAW, JIGSAW_DRAW + 3 * PATCHES, device=keys.device)
    order, top, left = uniforms(keys[:, None], draws).to(views.device).split(PATCHES, 1)  # (N, 9) each
    order = order.argsort(1)  # place i gets the patch of cell order[i]
    within = torch.arange(patch, device=views.device)
    rows = (order // GRID * cell + (top * (cell - patch + 1)).long())[..., None] + within  # (N, 9, side)
    columns = (order % GRID * cell + (left * (cell - patch + 1)).long())[..., None] + within
    sample = torch.arange(n, device=views.device)[:, None, None, None]
    pixels = views.permute(0, 2, 3, 1)[sample, rows[..., :, None], columns[..., None, :]]  # (N, 9, side, side, 3)
    out = torch.zeros_like(views)
    whole = GRID * patch
    out[:, :, :whole, :whole] = (
        pixels.view(n, GRID, GRID, patch, patch, 3).permute(0, 5, 1, 3, 2, 4).reshape(n, 3, whole, whole)
    )
    return out


def patches(views: Tensor) -> Tensor:
    """Takes a view that jigsaw() made apart: (N, 3, S, S) -> (N, 9, 3, side, side), in the order of their places."""
    n, _, size, _ = views.shape
    patch = patch_side(size)
    pixels = views[:, :, : GRID * patch, : GRID * patch].reshape(n, 3, GRID, patch, GRID, patch)
    return pixels.permute(0, 2, 4, 1, 3, 5).reshape(n, PATCHES, 3, patch, patch)
