"""A view cut into patches that are moved a little and shuffled: Noroozi, Favaro, 2016, arxiv.org/abs/1603.09246, as
Misra, van der Maaten, 2020, arxiv.org/abs/1912.01991 have it (facebookresearch/vissl, ImgPatchesFromTensor)."""

import torch
from torch import Tensor

from kilobatch.data.counter_rng import uniforms
from kilobatch.data.views.columns import JIGSAW_DRAW

GRID = 3
PATCHES = GRID * GRID


def side(size: int) -> int:
    """Pixels of a patch's side: 64 of a view of 255, whose cells have 85, and 56 of one of 224."""
    return size * 64 // 255


def jigsaw(views: Tensor, keys: Tensor) -> Tensor:
    """views (N, 3, S, S) on any device, keys (N,) int64 of the views -> (N, 3, S, S): nine patches of side(S), one from
    anywhere in each cell of a 3x3 grid, edge to edge in a random order in the top left corner; zeros elsewhere.

    Differs from the authors' in that a view is coloured and flipped as a whole, and then cut.
    """
    n, _, size, _ = views.shape
    cell, patch = size // GRID, side(size)
    draws = torch.arange(JIGSAW_DRAW, JIGSAW_DRAW + 3 * PATCHES, device=keys.device)
    order, top, left = uniforms(keys[:, None], draws).to(views.device).split(PATCHES, 1)  # (N, 9) each
    order = order.argsort(1)  # which cell comes to which place
    within = torch.arange(patch, device=views.device)
    rows = (order // GRID * cell + (top * (cell - patch + 1)).long())[..., None] + within  # (N, 9, side)
    columns = (order % GRID * cell + (left * (cell - patch + 1)).long())[..., None] + within
    sample = torch.arange(n, device=views.device)[:, None, None, None]
    cut = views.permute(0, 2, 3, 1)[sample, rows[..., :, None], columns[..., None, :]]  # (N, 9, side, side, 3)
    out = torch.zeros_like(views)
    whole = GRID * patch
    out[:, :, :whole, :whole] = (
        cut.view(n, GRID, GRID, patch, patch, 3).permute(0, 5, 1, 3, 2, 4).reshape(n, 3, whole, whole)
    )
    return out


def patches(views: Tensor) -> Tensor:
    """What jigsaw() made, (N, 3, S, S) -> (N, 9, 3, side, side): the patches in the order that they lie in."""
    n, _, size, _ = views.shape
    patch = side(size)
    cut = views[:, :, : GRID * patch, : GRID * patch].reshape(n, 3, GRID, patch, GRID, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(n, PATCHES, 3, patch, patch)
