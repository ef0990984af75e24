"""Converts normalised images to bytes, and arranges them in pictures."""

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

Triple = tuple[float, float, float]


def to_bytes(images: Tensor, mean: Triple, std: Triple) -> Tensor:
    """(..., 3, H, W) normalised -> the same shape in uint8. mean, std: what they were normalised with, in 0..1."""
    scale, shift = (images.new_tensor(values).view(3, 1, 1) * 255 for values in (std, mean))
    return (images * scale + shift).round().clamp(0, 255).to(torch.uint8)


def grid(views: Tensor, columns: int = 8, side: int = 96) -> Tensor:
    """One picture of samples side by side, each with its views one below another, and `columns` samples in a band.

    views (N, V, 3, H, W) uint8 -> (3, height, width) uint8. Images of fewer than `side` pixels are enlarged by a whole
    factor.
    """
    samples, count = views.shape[:2]
    factor = max(1, side // views.shape[-1])
    tiles = interpolate(views.flatten(0, 1).float(), scale_factor=factor).to(torch.uint8)
    tiles = tiles.view(samples, count, *tiles.shape[1:])
    height, width = tiles.shape[-2:]
    gap, bands = 2, -(-samples // columns)
    band = count * (height + gap) + 3 * gap
    canvas = torch.full((3, bands * band - 2 * gap, columns * (width + gap) + gap), 255, dtype=torch.uint8)
    for i in range(samples):
        for v in range(count):
            top, left = i // columns * band + gap + v * (height + gap), gap + i % columns * (width + gap)
            canvas[:, top : top + height, left : left + width] = tiles[i, v]
    return canvas


def stacked(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures (3, height, width) uint8 one below another, on white."""
    width = max(picture.shape[2] for picture in pictures)
    return torch.cat([pad(picture, (0, width - picture.shape[2]), value=255) for picture in pictures], 1)


def png(image: Tensor) -> bytes:
    """(3, H, W) uint8 -> a PNG's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(buffer, format="png")
    return buffer.getvalue()
