"""Augments a batch on a GPU in few kernels: bytes in, finished views out; only blurred images are stored in between.

The draws are known on the host, which sends one table of parameters ahead: nothing waits for the device.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from kilobatch.data.augment import pillow_ops
from kilobatch.data.augment.batch_parameters import affected_rows, put_rows, taps
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

    host_table = parameters(values, plans)
    table = to_device(host_table, x)
    means = torch.empty(len(x), device=x.device)
    pixels, blocks = height * width, triton.cdiv(height * width, BLOCK)
    x_strides, out_strides = (tuple(t.stride(axis) for axis in (0, 1, 3)) for t in (x, out))  # image, channel, pixel
    mean_std = plans[0, columns.MEAN : columns.COLUMNS].tolist()

    jittered, blurred = affected_rows(values, columns.JITTER), affected_rows(values, columns.BLUR)
    not_blurred = (values[:, columns.BLUR] <= 0).nonzero().flatten()
    if len(jittered):
        launch(colour.grey_means, (len(jittered),), x, table, to_device(jittered, x), means, pixels, *x_strides)
    bytewise = affected_rows(values, columns.PHOTOMETRIC)
    if len(bytewise):
        x = change_bytes(x, host_table, means, bytewise, values)
        host_table[bytewise, colour.ORDER] = colour.NO_ORDER
        table = to_device(host_table, x)
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


def change_bytes(x: Tensor, host_table: Tensor, means: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """x (M, 3, H, W) bytes -> a copy of which these rows are jittered, and then changed by Pillow's operations."""
    made = x.clone()
    _, _, height, width = x.shape
    pixels = height * width
    ungreyed = host_table.clone()
    ungreyed[:, colour.GREYED] = 0
    table = to_device(ungreyed, x)
    strides, planar = (x.stride(0), x.stride(1), x.stride(3)), (3 * pixels, pixels, 1)
    unused = (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)  # mean and std
    for some in rows.split(GROUP):
        coloured = torch.empty(len(some), 3, height, width, device=x.device)
        tensors, programs = (x, table, to_device(some, x), means, coloured), (len(some), triton.cdiv(pixels, BLOCK))
        launch(colour.colour, programs, *tensors, pixels, *strides, *planar, *unused, FINISH=False)
        pillow_ops.photometric(coloured, values[some])
        put_rows(made, some, coloured.to(torch.uint8))
    return made


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
    never = torch.tensor(torch.inf, dtype=values.dtype)  # a threshold that no pixel reaches
    table[:, colour.THRESHOLD] = values[:, columns.THRESHOLD].where(values[:, columns.SOLARIZE] > 0, never)
    table[:, colour.BORDER] = plans[:, columns.BORDER]
    return table


def to_device(values: Tensor, like: Tensor) -> Tensor:
    """Copies to the device of `like`, without waiting for it."""
    return values.pin_memory().to(like.device, non_blocking=True) if like.device.type == "cuda" else values
