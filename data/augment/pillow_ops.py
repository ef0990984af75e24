"""Pillow's operations on bytes, batched in torch: posterize, sharpness, solarize, autocontrast and equalize."""

import torch
from torch import Tensor

from kilobatch.data.augment.batch_parameters import affected_rows, per_image, put_rows, take_rows
from kilobatch.data.views import columns

LEVELS = 256


def photometric(x: Tensor, values: Tensor) -> None:
    """x (M, 3, H, W) float32 in 0..255, in place: rounded, then what values (M, VALUES), on the host, say; as
    cpu/pillow_ops.py. Afterwards it holds whole numbers."""
    x.round_()
    rows = affected_rows(values, columns.POSTERIZE)
    if len(rows):
        step = per_image(2 ** (8 - values[rows, columns.BITS].floor()), x)
        put_rows(x, rows, (take_rows(x, rows) / step).floor_() * step)

    rows = affected_rows(values, columns.SHARPEN)
    if len(rows):
        put_rows(x, rows, sharpen(take_rows(x, rows), per_image(values[rows, columns.SHARPNESS], x)))

    rows = affected_rows(values, columns.SOLARIZE_EARLY)
    if len(rows):
        part, threshold = take_rows(x, rows), per_image(values[rows, columns.EARLY_THRESHOLD], x)
        put_rows(x, rows, torch.where(part >= threshold, LEVELS - 1 - part, part))

    for operation, table_of in ((columns.AUTOCONTRAST, autocontrast), (columns.EQUALIZE, equalize)):
        rows = affected_rows(values, operation)
        if len(rows):
            levels = take_rows(x, rows).long().flatten(2)  # (m, 3, pixels)
            part = table_of(levels).to(x.dtype).gather(2, levels)
            put_rows(x, rows, part.unflatten(2, x.shape[2:]))


def sharpen(x: Tensor, factors: Tensor) -> Tensor:
    """(m, 3, H, W) whole numbers, (m, 1, 1, 1): 0 for the mean of 3x3 pixels, of which the middle one counts fivefold,
    1 for the image; the outermost pixels stay as they are."""
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * x[:, :, 1:-1, 1:-1]
    smooth = x.clone()
    smooth[:, :, 1:-1, 1:-1] = ((total + 6.5) / 13).floor_()  # a sum of whole numbers is never half-way
    return (smooth + factors * (x - smooth)).clamp_(0, LEVELS - 1).floor_()


def autocontrast(levels: Tensor) -> Tensor:
    """(m, 3, pixels) whole numbers -> (m, 3, 256) tables that stretch those that occur to 0..255."""
    low, high = levels.amin(2, keepdim=True), levels.amax(2, keepdim=True)
    every = torch.arange(LEVELS, device=levels.device)
    span = (high - low).clamp(min=1).double()
    scale = torch.full_like(span, 255).div_(span)  # 255 / span would be the rounded 1 / span, 255 times
    stretched = (every * scale + -low * scale).trunc_().clamp_(0, LEVELS - 1)
    return torch.where(high > low, stretched, every.double())


def equalize(levels: Tensor) -> Tensor:
    """(m, 3, pixels) whole numbers -> (m, 3, 256) tables that make of a level the share of pixels below it."""
    counts = torch.zeros(*levels.shape[:2], LEVELS, dtype=torch.int64, device=levels.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    last = counts.gather(2, levels.amax(2, keepdim=True))
    step = (levels.shape[2] - last) // 255
    spread = (step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)
    return torch.where(step > 0, spread.clamp_(max=LEVELS - 1), torch.arange(LEVELS, device=levels.device))
