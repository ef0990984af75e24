"""Operations on bytes: Pillow's own, to the bit, in both back ends; after jitter both give the same images."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor

from kilobatch.data.augment.cpu import augment as cpu
from kilobatch.data.augment.device import augment
from kilobatch.data.counter_rng import key
from kilobatch.data.tensor_rng import keys
from kilobatch.data.views import columns
from kilobatch.data.views.draws import draw_all, draw_values
from kilobatch.data.views.options import Jitter, Photometric, Solarize, Views
from kilobatch.data.views.photometric import Posterize, Sharpness
from tests.data.augment.test_augment import PHOTOMETRIC, batched, only, parameter, photos, planar
from tests.helpers.process_groups import run_ranks

SIDE, COUNT = 48, 48
Bytes = NDArray[np.uint8]
OPERATIONS: dict[str, Photometric] = {
    "posterize": Photometric(posterize=Posterize(bits=(1, 8))),
    "sharpness": Photometric(sharpness=Sharpness(factor=(0, 4))),
    "solarize": Photometric(solarize=Solarize(probability=1, threshold=(0, 256))),
    "autocontrast": Photometric(autocontrast=1),
    "equalize": Photometric(equalize=1),
    "all, each now and then": PHOTOMETRIC,
    "PIRL's": Photometric(
        probability=0.66,
        posterize=Posterize(),
        sharpness=Sharpness(),
        solarize=Solarize(probability=1, threshold=(0, 256)),
        autocontrast=1,
    ),
}


@cache
def parts_of_photographs() -> Bytes:
    """(COUNT, SIDE, SIDE, 3): parts of two photographs, and images on which an operation has a case of its own."""
    rng, parts = np.random.default_rng(0), []
    for photograph in load_sample_images().images:
        for _ in range(COUNT // 2 - 4):
            top, left = (rng.integers(0, side - SIDE) for side in photograph.shape[:2])
            parts.append(photograph[top : top + SIDE, left : left + SIDE])
    black, one_pixel = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    one_pixel[20, 20] = 255, 1, 128
    parts += [black, black + 255, black + 77, one_pixel, 255 - one_pixel]
    parts += [rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8), *photos(2, SIDE)]
    return np.stack(parts)


def inverted_from(threshold: float) -> list[int]:
    return [level if level < threshold else 255 - level for level in range(256)]


def by_pillow(image: Bytes, views: Views, i: int) -> Bytes:
    """Image i with what its view draws, done by Pillow."""
    drawn: Callable[[int], float] = lambda value: parameter(views, i, value)  # noqa: E731
    made = Image.fromarray(image)
    if drawn(columns.PHOTOMETRIC) <= 0:
        return image
    if drawn(columns.POSTERIZE) > 0:
        made = ImageOps.posterize(made, int(drawn(columns.BITS)))
    if drawn(columns.SHARPEN) > 0:
        made = ImageEnhance.Sharpness(made).enhance(drawn(columns.SHARPNESS))
    if drawn(columns.SOLARIZE_EARLY) > 0:
        made = made.point(3 * inverted_from(drawn(columns.EARLY_THRESHOLD)))
    if drawn(columns.AUTOCONTRAST) > 0:
        made = ImageOps.autocontrast(made)
    if drawn(columns.EQUALIZE) > 0:
        made = ImageOps.equalize(made)
    return np.asarray(made)


@pytest.mark.parametrize("back_end", [planar, batched])
@pytest.mark.parametrize("name", OPERATIONS)
def test_bytes_are_pillows(name: str, back_end: Callable[..., Tensor]) -> None:
    views, images = only(size=SIDE, photometric=OPERATIONS[name]), parts_of_photographs()
    ours = 255 * back_end(images, views).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - np.rint(ours)).max() < 1e-4
    theirs = np.stack([by_pillow(image, views, i) for i, image in enumerate(images)])
    assert np.array_equal(np.rint(ours), theirs)
    assert np.mean(np.abs(theirs.astype(float) - images)) > 2


def test_solarize_is_pillows() -> None:
    """`by_pillow` has a table for a threshold between two levels: Pillow's own compares with it in the same way."""
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for threshold in (0, 1, 127.3, 128, 255, 255.5, 256):
        own = ImageOps.solarize(levels, threshold)  # pyright: ignore[reportArgumentType]
        assert own.tobytes() == levels.point(inverted_from(threshold)).tobytes()


def differences(views: Views) -> Tensor:
    """(images,) mean difference of the batched form from the CPU's, of 255."""
    torch.set_num_threads(1)
    images = parts_of_photographs()
    ours = np.empty((len(images), 3, SIDE, SIDE), np.float32)
    scratch = np.empty(cpu.scratch_length(views), np.float32)
    for i, image in enumerate(images):
        own = np.uint64(key(1, 2, i, 0))
        cpu.augment(image, draw_all(own, own, views.plan()), views.plan(), ours[i], scratch)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)[:, None]
    theirs = augment(pixels, keys(1, 2, torch.arange(len(images)), 1), views)[:, 0]
    return 255 * (torch.from_numpy(ours) - theirs).abs().mean((1, 2, 3))


@pytest.mark.parametrize("interpreted", [False, True])
def test_back_ends_agree_after_jitter(interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum in another order may round to another byte, which then may lie on the other side of a threshold."""
    views = only(size=SIDE, jitter=Jitter(), photometric=PHOTOMETRIC, grey=0.2)
    if interpreted:
        pytest.importorskip("triton", reason="no triton for this system", exc_type=ImportError)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        apart = run_ranks(1, differences, views, timeout=300)[0]
    else:
        apart = differences(views)
    assert apart.max() < 0.05 and apart.median() < 1e-3, apart


def test_draws_are_as_the_ranges_say() -> None:
    n, plans = 20_000, torch.from_numpy(only(photometric=OPERATIONS["PIRL's"]).plans())
    drawn = draw_values(keys(1, 2, torch.arange(n), 1), plans)[:, 0]
    assert abs((drawn[:, columns.PHOTOMETRIC] > 0).double().mean() - 0.66) < 0.015
    bits = torch.bincount(drawn[:, columns.BITS].long(), minlength=9) / n
    assert (bits[4:] - 0.2).abs().max() < 0.015 and bits[:4].sum() == 0
    for value, (low, high) in {columns.SHARPNESS: (0.1, 1.9), columns.EARLY_THRESHOLD: (0, 256)}.items():
        quarters = torch.histc((drawn[:, value].float() - low) / (high - low), 4, 0, 1) / n
        assert (quarters - 0.25).abs().max() < 0.015
    for always in (columns.POSTERIZE, columns.SHARPEN, columns.SOLARIZE_EARLY, columns.AUTOCONTRAST):
        assert (drawn[:, always] > 0).all()
    assert not (drawn[:, columns.EQUALIZE] > 0).any()


@pytest.mark.parametrize("back_end", [planar, batched])
def test_a_last_threshold_can_be_drawn(back_end: Callable[..., Tensor]) -> None:
    views, images = only(size=SIDE, solarize=Solarize(probability=1, threshold=(20, 200))), parts_of_photographs()
    got = np.rint(255 * back_end(images, views).permute(0, 2, 3, 1).numpy())
    thresholds = [parameter(views, i, columns.THRESHOLD) for i in range(len(images))]
    assert np.ptp(thresholds) > 100
    for image, made, threshold in zip(images, got, thresholds, strict=True):
        assert np.array_equal(made, np.where(image >= threshold, 255 - image, image))
