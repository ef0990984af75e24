"""Measures how far other ways to prepare an image are from kilobatch's own: python -m benchmarks.data.preprocessing

The images are scikit-learn's two photographs, in four sizes that a conversion does not shrink, and in one that it does.
The first rows compare other ways with `preprocess` on the same pixels, the others `preprocess` of a file's path with
`preprocess` of the pixels that Pillow decodes of it. Printed are differences of pixels, in units of 1 of 255, and the
distance of the features of an untrained ResNet-50, as a share of that between the two photographs.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.transforms import v2

from kilobatch.data.loading.preprocess import Preprocess
from kilobatch.data.views.options import Views
from kilobatch.methods.networks.build import build_encoder
from kilobatch.methods.networks.options import EncoderOptions

VIEWS = Views(size=224)
SIDES = [(500, 334), (334, 500), (384, 288), (320, 240)]
MEAN, STD = list(VIEWS.mean), list(VIEWS.std)
FINISH = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
TWO_STEPS = v2.Compose([v2.Resize(256), v2.CenterCrop(224), *FINISH])
TENSOR = v2.Compose([v2.PILToTensor(), v2.Resize(256), v2.CenterCrop(224), *FINISH[1:]])
NO_ANTIALIAS = v2.Compose([v2.PILToTensor(), v2.Resize(256, antialias=False), v2.CenterCrop(224), *FINISH[1:]])


def one_step(image: Image.Image) -> Tensor:
    """The central square of 224/256 of the shorter side, cut out and resized by Pillow."""
    side = round(0.875 * min(image.size))
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cut = image.crop((left, top, left + side, top + side))
    return v2.Compose(FINISH)(cut.resize((224, 224), Image.Resampling.BILINEAR))


WAYS: dict[str, Callable[[Image.Image], Tensor]] = {
    "Pillow: crop, then resize": one_step,
    "torchvision: Resize(256), CenterCrop(224), of a PIL image": TWO_STEPS,
    "the same of a tensor": TENSOR,
    "the same of a tensor, antialias=False": NO_ANTIALIAS,
}


def measure(pairs: list[tuple[Tensor, Tensor]], encoder: nn.Module, unit: float) -> str:
    """Differences of pixels, of 255: mean, 99th percentile, largest; and the mean distance of the features in units."""
    std = 255 * torch.tensor(STD)[:, None, None]
    off = torch.cat([((one - other).abs() * std).flatten() for one, other in pairs]).numpy()
    distances = [distance(encoder, *pair) for pair in pairs]
    return f"{off.mean():6.2f} {np.quantile(off, 0.99):6.1f} {off.max():6.1f} {np.mean(distances) / unit:9.2%}"


def distance(encoder: nn.Module, one: Tensor, other: Tensor) -> float:
    return (encoder(one[None]) - encoder(other[None])).norm().item()


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    preprocess, encoder = Preprocess(VIEWS), build_encoder(EncoderOptions(name="resnet50")).eval()
    photos = [Image.fromarray(array) for array in load_sample_images().images]
    print(f"{'of 255':62} {'mean':>6} {'99 %':>6} {'most':>6} {'features':>9}")
    unit = distance(encoder, *map(preprocess, photos))  # of the two photographs
    images = [photo.resize(size, Image.Resampling.LANCZOS) for photo in photos for size in SIDES]
    for name, way in WAYS.items():
        print(f"{name:62} {measure([(preprocess(image), way(image)) for image in images], encoder, unit)}")
    with TemporaryDirectory() as folder:
        for ending, sides in (("jpg", SIDES), ("png", SIDES), ("jpg", [(640, 427)]), ("png", [(640, 427)])):
            pairs: list[tuple[Tensor, Tensor]] = []
            for number, size in product(range(len(photos)), sides):
                path = Path(folder, f"{number}-{size[0]}.{ending}")
                photos[number].resize(size, Image.Resampling.LANCZOS).save(path, quality=92)
                pairs.append((preprocess(path), preprocess(Image.open(path).convert("RGB"))))
            name = f"preprocess of what Pillow decoded of a {'larger ' if sides != SIDES else ''}.{ending}"
            print(f"{name:62} {measure(pairs, encoder, unit)}")


if __name__ == "__main__":
    main()
