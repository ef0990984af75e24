"""Both back-ends of augmentation: torchvision's images for the same parameters, and equal images for the same keys."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from kilobatch.data.augment.cpu import augment as cpu
from kilobatch.data.augment.device import augment
from kilobatch.data.counter_rng import key
from kilobatch.data.tensor_rng import keys
from kilobatch.data.views import columns
from kilobatch.data.views.draws import draw_all, draw_value
from kilobatch.data.views.options import (
    Affine,
    Blur,
    Border,
    Jitter,
    Photometric,
    Second,
    Solarize,
    Views,
)
from kilobatch.data.views.photometric import Posterize, Sharpness

COUNT, SIDE = 24, 40
NOTHING = Views(count=1, size=SIDE, jitter=None, grey=0, blur=None, mean=(0, 0, 0), std=(1, 1, 1))
MOVES = Affine(degrees=20, shift=0.25, scale=(0.75, 1.25), shear=0.2, fill=50)
PHOTOMETRIC = Photometric(
    probability=0.7,
    posterize=Posterize(probability=0.8),
    sharpness=Sharpness(probability=0.8, factor=(0, 3)),
    solarize=Solarize(probability=0.5, threshold=(0, 256)),
    autocontrast=0.5,
    equalize=0.5,
)
EVERYTHING = NOTHING.model_copy(
    update={
        "count": 2,
        "affine": MOVES.model_copy(update={"probability": 0.5}),
        "jitter": Jitter(),
        "grey": 0.2,
        "blur": Blur(kernel=9),
        "solarize": Solarize(probability=0.3),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
)


def photos(count: int, side: int, seed: int = 0) -> NDArray[np.uint8]:
    """(count, side, side, 3): noise with the spectrum of photographs, whose amplitude falls with the frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(rng.normal(size=(count, 3, side, side))) / frequency
    images = np.fft.irfft2(noise, s=(side, side))
    images = 128 + 70 * images / images.std((1, 2, 3), keepdims=True) + rng.normal(scale=30, size=(count, 3, 1, 1))
    return np.ascontiguousarray(images.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def planar(images: NDArray[np.uint8], views: Views, first: int = 0) -> Tensor:
    """One view of each image; their sample indices begin at `first`."""
    out = np.empty((len(images), 3, *images.shape[1:3]), np.float32)
    scratch = np.empty(cpu.scratch_length(views), np.float32)
    for i, image in enumerate(images):
        own = np.uint64(key(1, 2, first + i, 0))
        cpu.augment(image, draw_all(own, own, views.plan()), views.plan(), out[i], scratch)
    return torch.from_numpy(out)


def batched(images: NDArray[np.uint8], views: Views, first: int = 0) -> Tensor:
    view_keys = keys(1, 2, torch.arange(first, first + len(images)), 1)
    return augment(channels_first(images)[:, None], view_keys, views)[:, 0]


def channels_first(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def parameter(views: Views, i: int, value: int) -> float:
    return float(draw_value(np.uint64(key(1, 2, i, 0)), views.plan(), value))


def only(**options: object) -> Views:
    return NOTHING.model_copy(update=options)


def jitter(**strengths: float) -> Views:
    return only(
        jitter=Jitter(**{"probability": 1, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, **strengths})
    )


def moved(image: Tensor, views: Views, i: int, margin: int = 60) -> Tensor:
    """torchvision's affine, on the image with a margin of `fill`: without it, it weighs the image's edge twice."""
    height, width = image.shape[-2:]
    fill = 50 / 255 if image.is_floating_point() else 50
    wide = F.affine(
        F.pad(image, [margin] * 4, fill=fill),
        angle=parameter(views, i, columns.ANGLE),
        translate=[width * parameter(views, i, columns.SHIFT_X), height * parameter(views, i, columns.SHIFT_Y)],
        scale=parameter(views, i, columns.SCALE),
        shear=[math.degrees(math.atan(parameter(views, i, columns.SHEAR))), 0.0],
        interpolation=F.InterpolationMode.BILINEAR,
        fill=[fill] * 3,
    )
    return F.crop(wide, margin, margin, height, width)


# Operation: the views that do it always, and torchvision's with the parameters that sample i draws.
OPERATIONS = {
    "nothing": (NOTHING, lambda x, v, i: x),
    "brightness": (
        jitter(brightness=0.8),
        lambda x, v, i: F.adjust_brightness(x, parameter(v, i, columns.BRIGHTNESS)),
    ),
    "contrast": (jitter(contrast=0.8), lambda x, v, i: F.adjust_contrast(x, parameter(v, i, columns.CONTRAST))),
    "saturation": (jitter(saturation=0.8), lambda x, v, i: F.adjust_saturation(x, parameter(v, i, columns.SATURATION))),
    "hue": (jitter(hue=0.5), lambda x, v, i: F.adjust_hue(x, parameter(v, i, columns.HUE))),
    "grey": (only(grey=1), lambda x, v, i: F.rgb_to_grayscale(x, 3)),
    "blur": (
        only(blur=Blur(probability=1, kernel=13)),
        lambda x, v, i: F.gaussian_blur(x, [13, 13], [parameter(v, i, columns.SIGMA)] * 2),
    ),
    "blur whose kernel is narrower than its sigma": (
        only(blur=Blur(probability=1, kernel=5, sigma=(3, 4))),
        lambda x, v, i: F.gaussian_blur(x, [5, 5], [parameter(v, i, columns.SIGMA)] * 2),
    ),
    "solarize": (
        only(solarize=Solarize(probability=1, threshold=128)),
        lambda x, v, i: F.solarize(x, 128 / 255 if x.is_floating_point() else 128),
    ),
    "affine": (only(affine=MOVES), moved),
}


def jitter_in_its_order(x: Tensor, views: Views, i: int) -> Tensor:
    steps = [
        lambda x: F.adjust_brightness(x, parameter(views, i, columns.BRIGHTNESS)),
        lambda x: F.adjust_contrast(x, parameter(views, i, columns.CONTRAST)),
        lambda x: F.adjust_saturation(x, parameter(views, i, columns.SATURATION)),
        lambda x: F.adjust_hue(x, parameter(views, i, columns.HUE)),
    ]
    for step in columns.ORDERS[int(parameter(views, i, columns.ORDER))]:
        x = steps[step](x)
    return x


OPERATIONS["jitter"] = (only(jitter=Jitter(probability=1)), jitter_in_its_order)


@pytest.mark.parametrize("back_end", [planar, batched])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_torchvisions(name: str, back_end):
    views, reference = OPERATIONS[name]
    images = photos(COUNT, SIDE)
    ours = 255 * back_end(images, views) / 255  # the plan's mean and std leave values in 0..1
    exactly = torch.stack([reference(x / 255, views, i) for i, x in enumerate(channels_first(images))])
    in_bytes = torch.stack([reference(x, views, i) for i, x in enumerate(channels_first(images))])
    difference = 255 * (ours - exactly).abs()
    # of 255, each pixel; torchvision on floats, whose blur is not cut at 3 sigma
    assert difference.max() < (0.2 if name == "blur" else 0.02)
    assert 255 * (ours - in_bytes / 255).abs().mean() < 2  # torchvision on bytes, which rounds after each operation
    if name != "nothing":
        assert (255 * (ours - channels_first(images) / 255).abs()).mean() > 2  # the operation does change images


@pytest.mark.parametrize("second", [None, Second(), Second(blur=Blur(kernel=3), solarize=Solarize(threshold=50))])
@pytest.mark.parametrize("side", [8, 33, 40, 96])
def test_both_back_ends_give_the_same_images(side: int, second: Second | None):
    views = EVERYTHING.model_copy(update={"size": side, "second": second})
    images = photos(2 * COUNT, side).reshape(COUNT, 2, side, side, 3)
    view_keys = keys(1, 2, torch.arange(COUNT), 2)
    theirs = augment(torch.from_numpy(images).permute(0, 1, 4, 2, 3), view_keys, views)
    ours = np.empty((COUNT, 2, 3, side, side), np.float32)
    scratch = np.empty(cpu.scratch_length(views), np.float32)
    for i in range(COUNT):
        for view in range(2):
            own, plan = np.uint64(key(1, 2, i, view)), views.plans()[view]
            cpu.augment(images[i, view], draw_all(own, own, plan), plan, ours[i, view], scratch)
    difference = 255 * torch.tensor(views.std)[:, None, None] * (torch.from_numpy(ours) - theirs).abs()
    assert difference.mean((2, 3, 4)).max() < 0.05  # of 255, each image
    assert np.abs(ours[:, 0] - ours[:, 1]).mean() > 0.1


def test_every_combination_of_operations_was_among_those_compared():
    plan = EVERYTHING.plan()
    flags = (columns.AFFINE, columns.JITTER, columns.GREY, columns.BLUR, columns.SOLARIZE)
    done = np.array(
        [[draw_value(np.uint64(key(1, 2, i, v)), plan, f) > 0 for f in flags] for i in range(COUNT) for v in range(2)]
    )
    assert done.any(0).all() and not done.all(0).any()
    assert len(np.unique(done, axis=0)) > 12


@pytest.mark.parametrize("back_end", [planar, batched])
def test_an_image_does_not_depend_on_its_place_in_the_batch(back_end):
    images = photos(COUNT, SIDE)
    views = EVERYTHING.model_copy(update={"count": 1})
    whole, part = back_end(images, views), back_end(images[10:13], views, first=10)
    torch.testing.assert_close(whole[10:13], part, rtol=0, atol=0 if back_end is planar else 1e-5)


@pytest.mark.parametrize("back_end", [planar, batched])
@pytest.mark.parametrize("level", [0, 1, 128, 254, 255])
def test_images_without_colour_or_contrast_stay_finite(level: int, back_end):
    views = EVERYTHING.model_copy(update={"count": 1})
    assert back_end(np.full((COUNT, SIDE, SIDE, 3), level, np.uint8), views).isfinite().all()


@pytest.mark.parametrize("back_end", [planar, batched])
def test_the_widest_kernel_that_is_allowed_is_reflected_rightly(back_end):
    views = only(size=8, blur=Blur(probability=1, kernel=15, sigma=(5, 6)))
    images = photos(COUNT, 8)
    theirs = [
        F.gaussian_blur(x / 255, [15, 15], [parameter(views, i, columns.SIGMA)] * 2)
        for i, x in enumerate(channels_first(images))
    ]
    torch.testing.assert_close(back_end(images, views), torch.stack(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("back_end", [planar, batched])
@pytest.mark.parametrize(("border", "scipys"), [("reflect", "mirror"), ("zero", "constant"), ("edge", "nearest")])
def test_borders_of_the_blur_are_scipys(border: Border, scipys: str, back_end):
    """The largest difference of any pixel, with kernels that end within the view and beyond it."""
    views = only(blur=Blur(probability=1, kernel=2 * SIDE - 1, sigma=(0.3, 20), border=border))
    images = photos(COUNT, SIDE)
    made = 255 * back_end(images, views)
    for i, image in enumerate(channels_first(images).double().numpy()):
        sigma = parameter(views, i, columns.SIGMA)
        for axis in (1, 2):
            radius = min(SIDE - 1, math.ceil(3 * sigma))
            image = ndimage.gaussian_filter1d(image, sigma, axis, mode=scipys, radius=radius)
        assert np.abs(made[i].numpy() - image).max() < 1e-3
    assert back_end is batched or len({parameter(views, i, columns.SIGMA) > 13 for i in range(COUNT)}) == 2


@pytest.mark.parametrize("back_end", [planar, batched])
def test_normalised_last(back_end):
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    images = photos(4, SIDE)
    theirs = F.normalize(channels_first(images) / 255, list(mean), list(std))
    torch.testing.assert_close(back_end(images, only(mean=mean, std=std)), theirs, rtol=0, atol=1e-5)


def test_moved_images_are_torchvisions():
    images, views = photos(COUNT, SIDE), only(affine=MOVES)
    view_keys = keys(1, 2, torch.arange(COUNT), 1)[:, 0].numpy()
    ours = cpu.affine_batch(images, view_keys, MOVES)
    assert ours.dtype == np.uint8 and ours.shape == images.shape
    for margin, allowed in ((60, 0.1), (0, 2)):
        theirs = torch.stack([moved(x, views, i, margin) for i, x in enumerate(channels_first(images))])
        assert (channels_first(ours).float() - theirs.float()).abs().mean() < allowed
    assert (cpu.affine_batch(images, view_keys, MOVES.model_copy(update={"probability": 0.0})) == images).all()


@pytest.mark.parametrize("back_end", [planar, batched])
def test_the_second_view_has_its_own_blur_and_solarization(back_end):
    """A second view is what a first view with its options would be."""
    views = only(
        count=2, blur=Blur(probability=1, kernel=9), second=Second(blur=None, solarize=Solarize(probability=1))
    )
    images = photos(4, SIDE)
    view_keys = keys(1, 2, torch.arange(4), 2)
    if back_end is batched:
        got = augment(channels_first(images)[:, None].expand(-1, 2, -1, -1, -1), view_keys, views)
    else:
        got = torch.empty(4, 2, 3, SIDE, SIDE)
        scratch = np.empty(cpu.scratch_length(views), np.float32)
        for i, image in enumerate(images):
            for view, plan in enumerate(views.plans()):
                own = np.uint64(key(1, 2, i, view))
                cpu.augment(image, draw_all(own, own, plan), plan, got[i, view].numpy(), scratch)
    solarized = torch.stack([F.solarize(x, 128) for x in channels_first(images)]).float() / 255
    torch.testing.assert_close(got[:, 1], solarized, rtol=0, atol=1e-5)
    assert torch.equal(got[:, 0], back_end(images, only(blur=views.blur)))
