"""Augments cropped views on an accelerator by torch's operations: batched, with parameters of its own for each image.

The same operations, order and draws as cpu/augment.py. Where Triton's kernels run and no affine moves are asked for,
kernels/photometric.py is used instead. The keys stay on the host, where the draws are known without waiting for the
device: so each operation runs on the images alone that it applies to.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kilobatch.data.augment.batch_parameters import affected_rows, per_image, put_rows, take_rows, taps
from kilobatch.data.augment.pillow_ops import photometric
from kilobatch.data.views import columns
from kilobatch.data.views.columns import DO_BRIGHTNESS, DO_CONTRAST, DO_SATURATION, GREY_WEIGHTS, ORDERS
from kilobatch.data.views.draws import draw_values
from kilobatch.data.views.options import BORDERS, Views

PADDING = {columns.REFLECT: "reflect", columns.ZERO: "constant", columns.EDGE: "replicate"}


def augment_by_torch(images: Tensor, keys: Tensor, views: Views) -> Tensor:
    """As device.augment, in float32: images (N, V, 3, H, W) uint8, keys (N, V) int64 on the host."""
    plans = torch.from_numpy(views.plans())  # (V, COLUMNS)
    values = draw_values(keys, plans).flatten(0, 1)  # (M, VALUES), M = N * V
    plans = plans.repeat(len(images), 1)  # (M, COLUMNS): one row for each view
    x = images.flatten(0, 1).float()  # (M, 3, H, W) in 0..255

    rows = affected_rows(values, columns.AFFINE)
    if len(rows):
        put_rows(x, rows, move(take_rows(x, rows), values[rows], plans[0, columns.FILL].item()))

    jittered = values[:, columns.JITTER] > 0
    order = torch.from_numpy(ORDERS)[values[:, columns.ORDER].long()]  # (M, 4)
    for place in range(4):
        for operation in range(4):
            rows = (jittered & (order[:, place] == operation)).nonzero().flatten()
            if len(rows):
                factors = values[rows, columns.BRIGHTNESS + operation]
                put_rows(x, rows, adjust(take_rows(x, rows), operation, per_image(factors, x)))

    rows = affected_rows(values, columns.PHOTOMETRIC)
    if len(rows):
        part = take_rows(x, rows)
        photometric(part, values[rows])
        put_rows(x, rows, part)

    rows = affected_rows(values, columns.GREY)
    if len(rows):
        put_rows(x, rows, grey(take_rows(x, rows)).expand(-1, 3, -1, -1))

    for border in BORDERS.values():
        rows = ((values[:, columns.BLUR] > 0) & (plans[:, columns.BORDER] == border)).nonzero().flatten()
        if len(rows):
            part = blur(take_rows(x, rows), values[rows, columns.SIGMA], plans[rows, columns.RADIUS], border)
            put_rows(x, rows, part)

    rows = affected_rows(values, columns.SOLARIZE)
    if len(rows):
        part = take_rows(x, rows)
        put_rows(x, rows, torch.where(part >= per_image(values[rows, columns.THRESHOLD], x), 255 - part, part))

    mean, std = plans[0, columns.MEAN : columns.STD], plans[0, columns.STD : columns.COLUMNS]
    x.sub_(mean.to(x.device)[:, None, None]).div_(std.to(x.device)[:, None, None])
    return x.unflatten(0, images.shape[:2])


def adjust(x: Tensor, operation: int, factors: Tensor) -> Tensor:
    """One jitter operation: torchvision's on float images, with values in 0..255."""
    if operation == DO_BRIGHTNESS:
        return (factors * x).clamp_(0, 255)
    if operation == DO_CONTRAST:
        return torch.lerp(grey(x).mean((1, 2, 3), keepdim=True), x, factors).clamp_(0, 255)
    if operation == DO_SATURATION:
        return torch.lerp(grey(x), x, factors).clamp_(0, 255)
    return hue(x, factors)


def grey(x: Tensor) -> Tensor:
    """(M, 3, H, W) -> (M, 1, H, W)."""
    r, g, b = (weight * channel for weight, channel in zip(GREY_WEIGHTS, x.unbind(1), strict=True))
    return (r + g + b)[:, None]


def hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turns colours around the circle; see cpu/colour.py's hue."""
    r, g, b = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    per = chroma.clamp(min=1e-6).reciprocal_()
    place = torch.where(high == g, (b - r) * per + 2, (r - g) * per + 4)
    place = torch.where(high == r, (g - b) * per, place) + 6 * turns[:, 0]
    channels = torch.arange(0, 6, 2, device=x.device, dtype=x.dtype)  # places of red, green and blue on the circle
    distance = place[:, None] - channels[:, None, None]
    distance = (distance - 6 * torch.floor(distance / 6 + 0.5)).abs_()
    return low[:, None] + chroma[:, None] * (2 - distance).clamp_(0, 1)


def blur(x: Tensor, sigma: Tensor, radius: Tensor, border: int) -> Tensor:
    """(M, 3, H, W), (M,) and (M,) pixels: blurs each image with its own sigma; kernels as in taps().

    border: REFLECT, ZERO or EDGE, for all of them."""
    m, _, height, width = x.shape
    weights, _ = taps(sigma, radius)
    reach = weights.shape[1] - 1
    weights = torch.cat([weights.flip(1)[:, :-1], weights], 1)  # (M, 2 reach + 1)
    weights = weights.to(x.dtype).to(x.device, non_blocking=True)
    kernel = weights.repeat_interleave(3, dim=0)[:, None, None, :]  # (M * 3, 1, 1, taps)
    x = F.pad(x, (reach,) * 4, mode=PADDING[border]).view(1, 3 * m, height + 2 * reach, width + 2 * reach)
    x = F.conv2d(x, kernel, groups=3 * m)
    return F.conv2d(x, kernel.transpose(2, 3), groups=3 * m).view(m, 3, height, width)


def move(x: Tensor, values: Tensor, fill: float) -> Tensor:
    """(M, 3, H, W), (M, VALUES): affine moves about the centre; see cpu/affine.py's matrix."""
    height, width = x.shape[-2:]
    angle, scale = torch.deg2rad(values[:, columns.ANGLE]), values[:, columns.SCALE]
    cos, sin, shear = angle.cos() / scale, angle.sin() / scale, values[:, columns.SHEAR]
    # In grid_sample's coordinates: -1 to 1 over each side, from pixel edge to pixel edge.
    a, b, d, e = cos - sin * shear, (cos * shear + sin) * height / width, -sin * width / height, cos
    from_x, from_y = 2 * values[:, columns.SHIFT_X], 2 * values[:, columns.SHIFT_Y]
    matrix = torch.stack([a, b, -a * from_x - b * from_y, d, e, -d * from_x - e * from_y], 1).view(-1, 2, 3)
    matrix = matrix.to(x.dtype).to(x.device, non_blocking=True)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x - fill, grid, padding_mode="zeros", align_corners=False) + fill
