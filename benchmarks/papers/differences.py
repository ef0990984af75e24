"""Measures how far views are from the authors', for docs/fidelity.md: python -m benchmarks.papers.differences

Blur and colours: of parts of 224 pixels of scikit-learn's two photographs, with values drawn as the recipes draw them,
beside Pillow and torchvision on bytes, which MoCo, lemniscate and vissl call. Decoding: both photographs as JPEGs of
quality 90. Their differences are of 255. Crops: the shares of the area of an image of 500 x 375 pixels, by
torchvision's rule, which is here, and by TensorFlow's (sample_distorted_bounding_box), which SimCLR calls.
"""

import io
import math
from collections.abc import Callable

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2 import functional as F

from kilobatch.data.augment.device import augment
from kilobatch.data.loading.ffcv_bindings import imdecode
from kilobatch.data.tensor_rng import keys
from kilobatch.data.views import columns
from kilobatch.data.views.crop_box import crop_box
from kilobatch.data.views.draws import draw_values
from kilobatch.data.views.options import Blur, Jitter, Views

SIDE, DRAWS, CROPS = 224, 200, 20_000
Bytes = NDArray[np.uint8]
NOTHING = Views(count=1, size=SIDE, jitter=None, grey=0, blur=None, mean=(0, 0, 0), std=(1, 1, 1))


def parts() -> Bytes:
    """(DRAWS, SIDE, SIDE, 3)."""
    random, photographs, cut = np.random.default_rng(0), load_sample_images().images, []
    for i in range(DRAWS):
        photograph = photographs[i % len(photographs)]
        top, left = (random.integers(0, side - SIDE + 1) for side in photograph.shape[:2])
        cut.append(photograph[top : top + SIDE, left : left + SIDE])
    return np.stack(cut)


def compare(name: str, views: Views, on_bytes: Callable[[Image.Image, list[float]], Image.Image]) -> None:
    """Prints the mean and the largest difference, and by how much the operation itself changes a pixel.

    on_bytes: the authors' operation on an image with the values that its view draws."""
    images, view_keys = parts(), keys(1, 2, torch.arange(DRAWS), 1)
    drawn = draw_values(view_keys, torch.from_numpy(views.plans()))[:, 0].tolist()
    ours = 255 * augment(torch.from_numpy(images).permute(0, 3, 1, 2)[:, None], view_keys, views)[:, 0]
    theirs = np.stack(
        [np.asarray(on_bytes(Image.fromarray(x), values)) for x, values in zip(images, drawn, strict=True)]
    )
    off = np.abs(ours.permute(0, 2, 3, 1).numpy() - theirs)
    changed = np.abs(theirs.astype(np.float32) - images).mean()
    print(f"{name:28} {off.mean():5.2f} in the mean, {off.max():5.1f} at most; changes a pixel by {changed:.1f}")


def jitter(**strengths: float) -> Views:
    none = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    return NOTHING.model_copy(update={"jitter": Jitter(probability=1, **{**none, **strengths})})


def jittered(image: Image.Image, values: list[float]) -> Image.Image:
    """By torchvision, in the drawn order; what has no strength is left out."""
    steps = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for step in columns.ORDERS[int(values[columns.ORDER])]:
        factor = values[columns.BRIGHTNESS + step]
        if factor != (0 if steps[step] is F.adjust_hue else 1):
            image = steps[step](image, factor)
    return image


@numba.njit
def decode(file: Bytes, pixels: Bytes, height: int, width: int) -> int:
    return imdecode(file.ctypes.data, len(file), height, width, pixels.ctypes.data, height, width, 0, 0, 1, 1, 0, 0)


def compare_decoders() -> None:
    for photograph in load_sample_images().images:
        stored = io.BytesIO()
        Image.fromarray(photograph).save(stored, "JPEG", quality=90)
        ours = np.empty_like(photograph)
        assert decode(np.frombuffer(stored.getvalue(), np.uint8).copy(), ours.ravel(), *photograph.shape[:2]) == 0
        off = np.abs(ours.astype(int) - np.asarray(Image.open(stored)))
        print(f"{'decoding a JPEG':28} {off.mean():5.2f} in the mean, {off.max():5.1f} at most")


def tensorflows_crop(random: np.random.Generator, height: int, width: int) -> float:
    """The share of the area of a crop: its ratio is uniform, and then its height, for a share from 0.08 on; below a
    tenth of the object, which is the whole image, SimCLR draws again."""
    while True:
        ratio = random.uniform(3 / 4, 4 / 3)
        low, high = (round(math.sqrt(share * height * width / ratio)) for share in (0.08, 1.0))
        tall = int(random.integers(low, min(high, height, int(width / ratio)) + 1))
        share = tall * round(tall * ratio) / (height * width)
        if share >= 0.1:
            return share


def compare_crops() -> None:
    random, plan = np.random.default_rng(0), NOTHING.plan()
    boxes = [crop_box(key, 375, 500, plan) for key in keys(1, 2, torch.arange(CROPS), 1)[:, 0].numpy().view(np.uint64)]
    ours = [box[2] * box[3] / (375 * 500) for box in boxes]
    theirs = [tensorflows_crop(random, 375, 500) for _ in range(CROPS)]
    print(f"{'area of a crop':28} {np.mean(ours):5.2f} in the mean, TensorFlow's {np.mean(theirs):.2f}")


def main() -> None:
    torch.set_num_threads(1)
    edge = NOTHING.model_copy(update={"blur": Blur(probability=1, border="edge")})
    compare("Pillow's blur", edge, lambda x, values: x.filter(ImageFilter.GaussianBlur(values[columns.SIGMA])))
    for name in ("brightness", "contrast", "saturation", "hue"):
        compare(f"{name} in bytes", jitter(**{name: 0.4}), jittered)
    compare("all four, MoCo v1's", jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4), jittered)
    compare_decoders()
    compare_crops()


if __name__ == "__main__":
    main()
