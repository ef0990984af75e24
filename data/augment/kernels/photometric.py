"""augment_batched.py's chain in few kernels: bytes in, finished views out, nothing between them but what is blurred.

What each image draws is known on the host, from where one table of parameters goes ahead; nothing waits for the device.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from kilobatch.data.augment.batch_parameters import chosen, taps
from kilobatch.data.augment.kernels import colour
from kilobatch.data.augment.kernels.blur import blur
from kilobatch.data.views import columns
from kilobatch.data.views.columns import ORDERS
from kilobatch.data.views.draws import all_drawn
from kilobatch.data.views.options import Views

BLOCK = 1024  # pixels of a program at a time
GROUP = 256  # images that are blurred at a time, between two planes of fp32 for each channel


def augment(images: Tensor, keys: Tensor, views: Views, dtype: torch.dtype = torch.float32) -> Tensor:
    """images (N, V, 3, H, W) uint8, keys (N, V) int64 on the host -> the views, normalised, in the images' layout.

    As augment_batched.augment, without affine moves.
    """
    plans = torch.from_numpy(views.plans())
    drawn = all_drawn(keys, plans).flatten(0, 1)  # (M, DRAWN)
    plans = plans.repeat(len(images), 1)
    x = images.flatten(0, 1)
    height, width = x.shape[-2:]
    if x.stride(2) != width * x.stride(3):
        x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    assert out.stride(2) == width * out.stride(3), out.stride()

    table = sent(parameters(drawn, plans), x)
    means = torch.empty(len(x), device=x.device)
    pixels, by_block = height * width, triton.cdiv(height * width, BLOCK)
    of, to = (x.stride(0), x.stride(1), x.stride(3)), (out.stride(0), out.stride(1), out.stride(3))
    finish = plans[0, columns.MEAN : columns.COLUMNS].tolist()

    jittered, blurred = chosen(drawn, columns.JITTER), chosen(drawn, columns.BLUR)
    plain = (drawn[:, columns.BLUR] <= 0).nonzero().flatten()
    if len(jittered):
        start(colour.grey_means, (len(jittered),), x, table, sent(jittered, x), means, pixels, *of)
    if len(plain):
        where = (x, table, sent(plain, x), means, out)
        start(colour.colour, (len(plain), by_block), *where, pixels, *of, *to, *finish, FINISH=True)
    for first in range(0, len(blurred), GROUP):
        rows = blurred[first : first + GROUP]
        weights, reach = taps(drawn[rows, columns.SIGMA], plans[rows, columns.RADIUS])
        which, weights, reach = sent(rows, x), sent(weights.float(), x), sent(reach.int(), x)
        once, twice = torch.empty(2, len(rows), 3, pixels, device=x.device)
        planar, programs = (3 * pixels, pixels, 1), (3 * len(rows), by_block)
        where = (x, table, which, means, once)
        start(colour.colour, (len(rows), by_block), *where, pixels, *of, *planar, *finish, FINISH=False)
        by, sides = (weights, reach, table, which), (height, width, weights.shape[1])
        start(blur, programs, once, *by, twice, *sides, *planar, *finish, DOWN=False)
        start(blur, programs, twice, *by, out, *sides, *to, *finish, DOWN=True)
    return out.unflatten(0, images.shape[:2])


def start(kernel: Any, programs: tuple[int, ...], *arguments: Any, **constants: bool) -> None:
    kernel[programs](*arguments, **constants, BLOCK=BLOCK)


def parameters(drawn: Tensor, plans: Tensor) -> Tensor:
    """(M, DRAWN), (M, COLUMNS) -> (M, PARAMETERS) fp32, as the kernels read them."""
    order = torch.from_numpy(ORDERS)[drawn[:, columns.ORDER].long()]  # (M, 4)
    table = torch.empty(len(drawn), colour.PARAMETERS)
    code = (order * torch.tensor([1, 4, 16, 64])).sum(1)
    table[:, colour.ORDER] = code.where(drawn[:, columns.JITTER] > 0, torch.tensor(colour.NO_ORDER))
    table[:, colour.FACTORS : colour.FACTORS + 4] = drawn[:, columns.BRIGHTNESS : columns.BRIGHTNESS + 4]
    table[:, colour.GREYED] = drawn[:, columns.GREY]
    none = torch.tensor(torch.inf)
    table[:, colour.THRESHOLD] = plans[:, columns.THRESHOLD].where(drawn[:, columns.SOLARIZE] > 0, none)
    return table


def sent(values: Tensor, like: Tensor) -> Tensor:
    """On its way to the device of `like`, without a wait."""
    return values.pin_memory().to(like.device, non_blocking=True) if like.device.type == "cuda" else values
