"""Augments a batch on a GPU in few kernels: bytes in, finished views out; only blurred images are stored in between.

The draws are known on the host, which sends one table of parameters ahead: nothing waits for the device.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from kilobatch.data.augment.batch_parameters import affected_rows, taps
from kilobatch.data.augment.kernels import colour
from kilobatch.data.augment.kernels.blur import blur
from kilobatch.data.views import columns
from kilobatch.data.views.columns import ORDERS
from kilobatch.data.views.draws import draw_values
from kilobatch.data.views.options import Views

BLOCK = 1024  # pixels of a program at a time
GROUP = 256  # images that are blurred at a time; each needs two planes of fp32 for each channel


def augment(images: Tensor, keys: Tensor, views: Views, dtype: torch.dtype = torch.float32) -> Tensor:
    """images (N, V, 3, H, W) uint8, keys (N, V) int64 on the host -> the views, normalised, in the images' layout.

    As torch_ops.augment_by_torch, without affine moves.
    """
    plans = torch.from_numpy(views.plans())
    values = draw_values(keys, plans).flatten(0, 1)  # (M, VALUES)
    plans = plans.repeat(len(images), 1)
    x = images.flatten(0, 1)
    height, width = x.shape[-2:]
    if x.stride(2) != width * x.stride(3):
        x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    assert out.stride(2) == width * out.stride(3), out.stride()

    table = to_device(parameters(values, plans), x)
    means = torch.empty(len(x), device=x.device)
    pixels, blocks = height * width, triton.cdiv(height * width, BLOCK)
    x_strides, out_strides = (tuple(t.stride(axis) for axis in (0, 1, 3)) for t in (x, out))  # image, channel, pixel
    mean_std = plans[0, columns.MEAN : columns.COLUMNS].tolist()

    jittered, blurred = affected_rows(values, columns.JITTER), affected_rows(values, columns.BLUR)
    not_blurred = (values[:, columns.BLUR] <= 0).nonzero().flatten()
    if len(jittered):
        launch(colour.grey_means, (len(jittered),), x, table, to_device(jittered, x), means, pixels, *x_strides)
    if len(not_blurred):
        tensors = (x, table, to_device(not_blurred, x), means, out)
        launch(
            colour.colour,
            (len(not_blurred), blocks),
            *tensors,
            pixels,
            *x_strides,
            *out_strides,
            *mean_std,
            FINISH=True,
        )
    for first in range(0, len(blurred), GROUP):
        rows = blurred[first : first + GROUP]
        weights, reach = taps(values[rows, columns.SIGMA], plans[rows, columns.RADIUS])
        which, weights, reach = to_device(rows, x), to_device(weights.float(), x), to_device(reach.int(), x)
        coloured, half_blurred = torch.empty(2, len(rows), 3, pixels, device=x.device)
        planar, programs = (3 * pixels, pixels, 1), (3 * len(rows), blocks)
        tensors = (x, table, which, means, coloured)
        launch(colour.colour, (len(rows), blocks), *tensors, pixels, *x_strides, *planar, *mean_std, FINISH=False)
        kernels, sizes = (weights, reach, table, which), (height, width, weights.shape[1])
        launch(blur, programs, coloured, *kernels, half_blurred, *sizes, *planar, *mean_std, DOWN=False)
        launch(blur, programs, half_blurred, *kernels, out, *sizes, *out_strides, *mean_std, DOWN=True)
    return out.unflatten(0, images.shape[:2])


def launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, **constants: bool) -> None:
    kernel[programs](*arguments, **constants, BLOCK=BLOCK)


def parameters(values: Tensor, plans: Tensor) -> Tensor:
    """(M, VALUES), (M, COLUMNS) -> (M, PARAMETERS) fp32, as the kernels read them."""
    order = torch.from_numpy(ORDERS)[values[:, columns.ORDER].long()]  # (M, 4)
    table = torch.empty(len(values), colour.PARAMETERS)
    code = (order * torch.tensor([1, 4, 16, 64])).sum(1)
    table[:, colour.ORDER] = code.where(values[:, columns.JITTER] > 0, torch.tensor(colour.NO_ORDER))
    table[:, colour.FACTORS : colour.FACTORS + 4] = values[:, columns.BRIGHTNESS : columns.BRIGHTNESS + 4]
    table[:, colour.GREYED] = values[:, columns.GREY]
    never = torch.tensor(torch.inf)  # a threshold that no pixel reaches
    table[:, colour.THRESHOLD] = plans[:, columns.THRESHOLD].where(values[:, columns.SOLARIZE] > 0, never)
    return table


def to_device(values: Tensor, like: Tensor) -> Tensor:
    """Copies to the device of `like`, without waiting for it."""
    return values.pin_memory().to(like.device, non_blocking=True) if like.device.type == "cuda" else values
