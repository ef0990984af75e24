"""Jigsaw views: a view is divided into patches, which are shifted at random and shuffled.

Noroozi, Favaro, 2016, arxiv.org/abs/1603.09246, in the form of Misra, van der Maaten, 2020, arxiv.org/abs/1912.01991
(facebookresearch/vissl, ImgPatchesFromTensor).
"""

import torch
from torch import Tensor

from kilobatch.data.augment.device import augment
from kilobatch.data.tensor_rng import part_keys, uniforms
from kilobatch.data.views.columns import FLIP_DRAW, GRID, JIGSAW_DRAW, PATCH_DRAW, PATCHES
from kilobatch.data.views.options import Views, patch_side


def augment_by_patch(images: Tensor, keys: Tensor, views: Views, dtype: torch.dtype = torch.float32) -> Tensor:
    """As device.augment, of two views, where the second becomes a jigsaw whose patches are flipped and coloured one by
    one; as in the authors' code. cpu/patches.py makes the same views."""
    own_keys = part_keys(keys[:, 1:], torch.arange(PATCH_DRAW, PATCH_DRAW + PATCHES))  # (N, 9)
    cut = patches(jigsaw(images[:, 1], keys[:, 1]))  # (N, 9, 3, side, side)
    flipped = uniforms(own_keys, torch.tensor(FLIP_DRAW)) < torch.tensor(views.flip, dtype=torch.float32)
    flipped = flipped.to(cut.device, non_blocking=True)[..., None, None, None]
    cut = torch.where(flipped, cut.flip(-1), cut)
    first = augment(images[:, :1], keys[:, :1], views.first_view(), dtype)[:, 0]
    return torch.stack([first, joined(augment(cut, own_keys, views.patch_views(), dtype), first)], 1)


def jigsaw(views: Tensor, keys: Tensor) -> Tensor:
    """views (N, 3, S, S) on any device, keys (N,) int64 of the views -> (N, 3, S, S) with nine patches.

    Each cell of a 3x3 grid gives one patch of patch_side(S) pixels, from a random place within the cell. They lie edge
    to edge in a random order in the top left corner; the rest is zeros.
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
    return joined(pixels.permute(0, 1, 4, 2, 3), views)


def joined(cut: Tensor, like: Tensor) -> Tensor:
    """(N, 9, 3, side, side) patches, edge to edge in the top left corner of zeros of the form of `like`."""
    whole = GRID * cut.shape[-1]
    out = torch.zeros_like(like)
    grid = cut.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 4, 2, 5)  # (N, 3, GRID, side, GRID, side)
    out[:, :, :whole, :whole] = grid.reshape(len(cut), 3, whole, whole)
    return out


def patches(views: Tensor) -> Tensor:
    """Takes a view that jigsaw() made apart: (N, 3, S, S) -> (N, 9, 3, side, side), in the order of their places."""
    n, _, size, _ = views.shape
    patch = patch_side(size)
    pixels = views[:, :, : GRID * patch, : GRID * patch].reshape(n, 3, GRID, patch, GRID, patch)
    return pixels.permute(0, 2, 4, 1, 3, 5).reshape(n, PATCHES, 3, patch, patch)
