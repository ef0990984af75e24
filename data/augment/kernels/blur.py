"""Kernel of one pass of a separable Gaussian blur, with weights of its own for each image and reflected borders."""

import triton
import triton.language as tl

from kilobatch.data.augment.kernels.colour import PARAMETERS as _PARAMETERS_
from kilobatch.data.augment.kernels.colour import THRESHOLD, finish

_THRESHOLD, _PARAMETERS = tl.constexpr(THRESHOLD), tl.constexpr(_PARAMETERS_)


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
    for tap in range(1, tl.load(reaches + slot) + 1):
        before = tl.abs(place - tap)
        behind = side - 1 - tl.abs(side - 1 - place - tap)
        if DOWN:
            first, second = before * width + x, behind * width + x
        else:
            first, second = y * width + before, y * width + behind
        pair = tl.load(plane + first, mask=inside, other=0.0) + tl.load(plane + second, mask=inside, other=0.0)
        total += tl.load(own + tap) * pair
    if DOWN:
        image = tl.load(which + slot)
        threshold = tl.load(parameters + image * _PARAMETERS + _THRESHOLD)
        mean = tl.where(channel == 0, mean_r, tl.where(channel == 1, mean_g, mean_b))
        std = tl.where(channel == 0, std_r, tl.where(channel == 1, std_g, std_b))
        total = finish(total, threshold, mean, std)
        tl.store(out + image * out_image + channel * out_channel + p.to(tl.int64) * out_pixel, total, mask=inside)
    else:
        tl.store(out + tl.program_id(0).to(tl.int64) * height * width + p, total, mask=inside)
