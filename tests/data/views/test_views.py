"""The options of a view, and its random draws: distributed as torchvision's."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy import stats
from torchvision.transforms import v2

from kilobatch.data.counter_rng import key
from kilobatch.data.tensor_rng import keys
from kilobatch.data.views import columns
from kilobatch.data.views.crop_box import crop_box
from kilobatch.data.views.draws import draw_value, draw_values
from kilobatch.data.views.options import (
    Affine,
    Blur,
    Crop,
    Jitter,
    Photometric,
    Second,
    Solarize,
    Views,
)
from kilobatch.data.views.photometric import Posterize, Sharpness

DRAWS = 3000
REJECT = 1e-3  # the seeds are fixed: a test that passes once passes always
EVERYTHING = Views(
    affine=Affine(probability=0.3, degrees=30, shift=0.25, scale=(0.75, 1.25), shear=0.2),
    jitter=Jitter(brightness=0.8, contrast=0.6, saturation=1.5, hue=0.2),
    solarize=Solarize(probability=0.2, threshold=(50, 200)),
    photometric=Photometric(
        posterize=Posterize(probability=0.5),
        sharpness=Sharpness(probability=0.5),
        solarize=Solarize(probability=0.5, threshold=(0, 256)),
        autocontrast=0.5,
        equalize=0.5,
    ),
)


def values(views: Views, value: int, n: int = DRAWS) -> NDArray[np.float64]:
    """n draws of one value, of as many samples."""
    plans = torch.from_numpy(views.plans())[:1]
    return draw_values(keys(1, 2, torch.arange(n), 1), plans)[:, 0, value].numpy()


def crops(height: int, width: int, views: Views, n: int = DRAWS) -> NDArray[np.int64]:
    """(n, 5): top, left, height, width, flip."""
    return np.array([crop_box(np.uint64(key(1, 2, i, 0)), height, width, views.plan()) for i in range(n)])


def torchvisions(transform: v2.Transform, height: int = 200, width: int = 300, n: int = DRAWS) -> list[dict]:
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    return [transform.make_params([image]) for _ in range(n)]


def assert_same_distribution(ours, theirs):
    test: Any = stats.ks_2samp(np.asarray(ours, float), np.asarray(theirs, float))
    assert test.pvalue > REJECT


@pytest.mark.parametrize(("height", "width"), [(200, 300), (300, 200), (150, 600), (33, 32)])
def test_crops_are_distributed_as_random_resized_crops(height: int, width: int):
    ours = crops(height, width, Views())
    names = ("top", "left", "height", "width")
    theirs = [[box[name] for name in names] for box in torchvisions(v2.RandomResizedCrop(224), height, width)]
    top, left, h, w = np.array(theirs).T
    assert_same_distribution(ours[:, 2] * ours[:, 3], h * w)
    assert_same_distribution(ours[:, 2] / ours[:, 3], h / w)
    assert_same_distribution(ours[:, 0], top)
    assert_same_distribution(ours[:, 1], left)
    assert (ours[:, 0] + ours[:, 2]).max() <= height and (ours[:, 1] + ours[:, 3]).max() <= width
    assert ours[:, 2:4].min() > 0


def test_a_crop_that_never_fits_falls_back_to_torchvisions_centre():
    sides = np.random.default_rng(0).integers(5, 500, (300, 2))
    scale, ratio = (1.0, 1.0), (3 / 4, 4 / 3)
    plan = Views(crop=Crop(scale=scale, ratio=ratio)).plan()
    transform = v2.RandomResizedCrop(224, scale=scale, ratio=ratio)
    compared = 0
    for height, width in sides.tolist():
        if 0.7 < height / width < 1.4:
            continue
        (box,) = torchvisions(transform, height, width, n=1)
        ours = crop_box(np.uint64(key(0, 0, 0, 0)), height, width, plan)[:4]
        assert ours == (box["top"], box["left"], box["height"], box["width"]), (height, width)
        compared += 1
    assert compared > 200


def test_without_crop_the_whole_image_is_taken():
    assert (crops(20, 30, Views(crop=None, flip=0), n=50) == [0, 0, 20, 30, 0]).all()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (columns.BRIGHTNESS, "brightness_factor"),
        (columns.CONTRAST, "contrast_factor"),
        (columns.SATURATION, "saturation_factor"),
        (columns.HUE, "hue_factor"),
    ],
)
def test_jitter_is_distributed_as_color_jitter(value: int, name: str):
    theirs = torchvisions(v2.ColorJitter(0.8, 0.6, 1.5, 0.2))
    assert_same_distribution(values(EVERYTHING, value), [parameters[name] for parameters in theirs])


def test_the_four_operations_come_in_each_order_equally_often():
    orders = [tuple(order) for order in columns.ORDERS.tolist()]
    assert len(set(orders)) == 24 and all(sorted(order) == [0, 1, 2, 3] for order in orders)
    counts = np.bincount(values(EVERYTHING, columns.ORDER, 24000).astype(int), minlength=24)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > REJECT


def test_blur_is_distributed_as_gaussian_blur():
    theirs = torchvisions(v2.GaussianBlur(23, sigma=(0.1, 2.0)))
    assert_same_distribution(values(EVERYTHING, columns.SIGMA), [parameters["sigma"][0] for parameters in theirs])


def test_moves_are_distributed_as_random_affine():
    shear = np.degrees(np.arctan(0.2))
    theirs = torchvisions(
        v2.RandomAffine([-30, 30], translate=(0.25, 0.25), scale=(0.75, 1.25), shear=shear), 2000, 2000
    )
    assert_same_distribution(values(EVERYTHING, columns.ANGLE), [p["angle"] for p in theirs])
    assert_same_distribution(values(EVERYTHING, columns.SCALE), [p["scale"] for p in theirs])
    assert_same_distribution(values(EVERYTHING, columns.SHIFT_X), [p["translate"][0] / 2000 for p in theirs])
    assert_same_distribution(values(EVERYTHING, columns.SHIFT_Y), [p["translate"][1] / 2000 for p in theirs])
    # Uniform in its tangent here, in its angle there; at these angles that is 0.3 % apart.
    assert_same_distribution(values(EVERYTHING, columns.SHEAR), [np.tan(np.radians(d["shear"][0])) for d in theirs])


@pytest.mark.parametrize(
    ("value", "probability"),
    [
        (columns.JITTER, 0.8),
        (columns.GREY, 0.2),
        (columns.BLUR, 0.5),
        (columns.SOLARIZE, 0.2),
        (columns.AFFINE, 0.3),
    ],
)
def test_an_operation_is_done_as_often_as_asked(value: int, probability: float):
    done = int((values(EVERYTHING, value, 20000) > 0).sum())
    assert stats.binomtest(done, 20000, probability).pvalue > REJECT


def test_flips_are_as_often_as_asked():
    assert stats.binomtest(int(crops(20, 30, Views(flip=0.3))[:, 4].sum()), DRAWS, 0.3).pvalue > REJECT
    assert crops(20, 30, Views(flip=1), n=200)[:, 4].all()


def test_probability_one_is_always_and_zero_is_never():
    always = Views(grey=1, jitter=Jitter(probability=1), blur=Blur(probability=1))
    never = Views(grey=0, jitter=None, blur=None)
    for value in (columns.GREY, columns.JITTER, columns.BLUR):
        assert (values(always, value, 20000) > 0).all()
        assert not (values(never, value, 20000) > 0).any()


def test_what_is_drawn_is_independent_of_what_else_is_drawn():
    n = 20000
    names = range(columns.VALUES)
    together = np.corrcoef([values(EVERYTHING, value, n) for value in names]) - np.eye(columns.VALUES)
    assert np.abs(together).max() < 4.5 / n**0.5


def test_both_forms_of_drawing_have_the_same_bits():
    index, plans = torch.arange(300), EVERYTHING.plans()
    batched = draw_values(keys(3, 4, index, 2), torch.from_numpy(plans))
    for i in range(300):
        for view in range(2):
            scalar = [draw_value(np.uint64(key(3, 4, i, view)), plans[view], value) for value in range(columns.VALUES)]
            assert batched[i, view].tolist() == scalar


def test_a_patch_flips_and_its_view_does_not():
    first, second = Views(flip=0.25, second=Second(by_patch=True)).plans()
    assert (first == Views(flip=0.25).plan()).all()
    assert (second[columns.FLIP], second[columns.PATCH_FLIP], second[columns.PATCH]) == (0, 0.25, 56)


def test_each_view_has_its_plan():
    views = Views(count=3)
    assert views.plans().shape == (3, columns.COLUMNS)
    assert (views.plans() == views.plan()).all()
    first, second = Views(blur=Blur(probability=1), second=Second()).plans()
    assert (first == Views(blur=Blur(probability=1)).plan()).all()
    assert (second == Views(blur=Blur(probability=0.1), solarize=Solarize()).plan()).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "greater than or equal to 1"),
        ({"size": 4}, "greater than or equal to 8"),
        ({"flip": 1.5}, "less than or equal to 1"),
        ({"grey": float("nan")}, "finite number"),
        ({"gray": 0.2}, "Extra inputs"),
        ({"crop": {"scale": [0.0, 1.0]}}, "greater than 0"),
        ({"crop": {"scale": [1.0, 0.2]}}, "(0.2, 1.0)"),
        ({"crop": {"ratio": [2.0, 0.5]}}, "backwards"),
        ({"jitter": {"hue": 0.6}}, "less than or equal to 0.5"),
        ({"jitter": {"brightness": -0.1}}, "greater than or equal to 0"),
        ({"blur": {"kernel": 4}}, "use 5"),
        ({"blur": {"sigma": [0, 1]}}, "greater than or equal to 0.01"),
        ({"size": 8, "blur": {"kernel": 17}}, "at most 15"),
        ({"size": 8, "second": {"blur": {"kernel": 17}}}, "second.blur.kernel 17"),
        ({"count": 3, "second": {}}, "count is 3; use 2"),
        ({"second": {"jitter": None}}, "Extra inputs"),
        ({"solarize": {"threshold": 256}}, "less than or equal to 255"),
        ({"solarize": {"threshold": [200, 100]}}, "(100.0, 200.0)"),
        ({"solarize": {"threshold": [0, 257]}}, "less than or equal to 256"),
        ({"photometric": {"posterize": {"bits": [0, 8]}}}, "greater than or equal to 1"),
        ({"photometric": {"posterize": {"bits": [8, 4]}}}, "(4, 8)"),
        ({"photometric": {"sharpness": {"factor": [-1, 1]}}}, "greater than or equal to 0"),
        ({"photometric": {"equalise": 1}}, "Extra inputs"),
        ({"blur": {"border": "mirror"}}, "'reflect', 'zero' or 'edge'"),
        ({"size": 32, "second": {"blur": {"kernel": 17}, "by_patch": True}}, "patch of size 8; use at most 15"),
        ({"affine": {"scale": [0, 1]}}, "greater than or equal to 0.01"),
        ({"std": [0.2, 0.0, 0.2]}, "greater than 0"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str):
    with pytest.raises(ValidationError) as refusal:
        Views.model_validate(options)
    assert message in str(refusal.value)
