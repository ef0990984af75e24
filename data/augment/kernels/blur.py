"""Kernel of one pass of a separable Gaussian blur, with weights and a border of its own for each image."""

import triton
import triton.language as tl

from kilobatch.data.augment.kernels.colour import BORDER, THRESHOLD, finish
from kilobatch.data.augment.kernels.colour import PARAMETERS as _PARAMETERS_
from kilobatch.data.views.columns import REFLECT, ZERO

_THRESHOLD, _BORDER, _PARAMETERS = tl.constexpr(THRESHOLD), tl.constexpr(BORDER), tl.constexpr(_PARAMETERS_)
_REFLECT, _ZERO = tl.constexpr(REFLECT), tl.constexpr(ZERO)


@triton.jit
def blur(
    planes, weights, reaches, parameters, which, out, height, width, taps, out_image, out_channel, out_pixel,
    mean_r, mean_g, mean_b, std_r, std_g, std_b, DOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Blurs planes (B, 3, height * width) fp32, contiguous: along rows, into `out` of the same layout. DOWN, the second
    pass: along columns; then planes are solarized, normalised and stored as image which[slot] of `out`.

    weights (B, taps): of the middle tap and those to one side, of which 1 + reaches[slot] are used; reach < side.
    """
    slot, channel = tl.program_id(0) // 3, tl.program_id(0) % 3
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = p < height * width
    y, x = p // width, p % width
    plane = planes + tl.program_id(0).to(tl.int64) * height * width
    own = weights + slot * taps
    total = tl.load(own) * tl.load(plane + p, mask=inside, other=0.0)
    place = y if DOWN else x
    side = height if DOWN else width
    image = tl.load(which + slot)
    border = tl.load(parameters + image * _PARAMETERS + _BORDER)
    reflected, lowest = border == _REFLECT, tl.where(border == _ZERO, 0, -taps)
    for tap in range(1, tl.load(reaches + slot) + 1):
        before, behind = place - tap, side - 1 - place - tap  # places from either end, beyond which they are negative
        sees_before, sees_behind = inside & (before >= lowest), inside & (behind >= lowest)
        before = tl.where(reflected, tl.abs(before), tl.maximum(before, 0))
        behind = side - 1 - tl.where(reflected, tl.abs(behind), tl.maximum(behind, 0))
        if DOWN:
            first, second = before * width + x, behind * width + x
        else:
            first, second = y * width + before, y * width + behind
        pair = tl.load(plane + first, mask=sees_before, other=0.0) + tl.load(
            plane + second, mask=sees_behind, other=0.0
        )
        total += tl.load(own + tap) * pair
    if DOWN:
        threshold = tl.load(parameters + image * _PARAMETERS + _THRESHOLD)
        mean = tl.where(channel == 0, mean_r, tl.where(channel == 1, mean_g, mean_b))
        std = tl.where(channel == 0, std_r, tl.where(channel == 1, std_g, std_b))
        total = finish(total, threshold, mean, std)
        tl.store(out + image * out_image + channel * out_channel + p.to(tl.int64) * out_pixel, total, mask=inside)
    else:
        tl.store(out + tl.program_id(0).to(tl.int64) * height * width + p, total, mask=inside)
