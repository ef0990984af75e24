"""Options of views, recipe section `data.views`: crop, colours, blur and the rest. The defaults are SimCLR's."""

import math
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator

from kilobatch.data.views import columns
from kilobatch.data.views.photometric import (
    Byte,
    Options,
    Photometric,
    Probability,
    Solarize,
    Strength,
    ascending,
    done,
)

PositiveFraction = Annotated[float, Field(gt=0, le=1)]  # of an area
Ratio = Annotated[float, Field(ge=0.01, le=100)]  # a ratio of two lengths
Sigma = Annotated[float, Field(ge=0.01, le=100)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Interpolation = Literal["bilinear", "bicubic"]
Border = Literal["reflect", "zero", "edge"]
Operation = Literal["crop", "flip", "affine", "jitter", "photometric", "grey", "blur", "solarize"]
BORDERS: dict[Border, int] = {"reflect": columns.REFLECT, "zero": columns.ZERO, "edge": columns.EDGE}


def patch_side(size: int) -> int:
    """Pixels of a side of a jigsaw's patches: 64 for a view of 255 pixels, whose cells have 85; 56 for one of 224."""
    return size * 64 // 255


class Crop(Options):
    """A random part of the image, resized: torchvision's RandomResizedCrop.

    scale: the range of its share of the image's area. ratio: the range of width / height.
    """

    scale: Annotated[tuple[PositiveFraction, PositiveFraction], AfterValidator(ascending)] = (
        0.08,
        1.0,
    )
    ratio: Annotated[tuple[Ratio, Ratio], AfterValidator(ascending)] = (3 / 4, 4 / 3)


class Jitter(Options):
    """Colours: with one probability all four, in a random order: factors from [max(0, 1 - x), 1 + x], hue [-x, x].

    probability: that a view is changed. brightness: x of its factor, how far it may be from 1. contrast: x of its
    factor, how far it may be from 1. saturation: x of its factor, how far it may be from 1. hue: x, in turns of the
    colour circle, either way.
    """

    probability: Probability = 0.8
    brightness: Strength = 0.8
    contrast: Strength = 0.8
    saturation: Strength = 0.8
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2


class Blur(Options):
    """Gaussian, cut at 3 sigma and at the kernel.

    probability: that a view is blurred. sigma: its range, in pixels. kernel: pixels, odd; null: a tenth of the size.
    border: what lies beyond the view: reflect is its reflection, as in torchvision's GaussianBlur; zero black, as in
    SimCLR's TensorFlow code; edge its last pixel again and again, as in Pillow's ImageFilter.GaussianBlur.

    Pillow's is what MoCo, BYOL's PyTorch codes, solo-learn, lightly and vissl call. It is not a Gaussian but three box
    filters, which no kernel cuts. With edge it is 0.46 of 255 from this one in the mean and 29 at most, where blurring
    itself changes a pixel by 6.5 (sigma from 0.1 to 2; benchmarks/papers/differences.py).
    """

    probability: Probability = 0.5
    sigma: Annotated[tuple[Sigma, Sigma], AfterValidator(ascending)] = (0.1, 2.0)
    kernel: Annotated[int, Field(ge=1, le=999)] | None = None
    border: Border = "reflect"

    @model_validator(mode="after")
    def odd(self) -> Self:
        if self.kernel is not None and self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} is even and has no centre; use {self.kernel + 1}")
        return self


class Affine(Options):
    """Moves about the image's centre: turn, shift, scale and shear, each drawn uniformly, read bilinearly.

    probability: that a view is moved. degrees: it is turned by up to this, either way. shift: share of the side, either
    way, across and down. scale: the range of its factor. shear: the largest tangent, either way, along x. fill: the
    byte that comes in from outside.
    """

    probability: Probability = 1.0
    degrees: Annotated[float, Field(ge=0, le=180)] = 0
    shift: Fraction = 0
    scale: Annotated[tuple[Ratio, Ratio], AfterValidator(ascending)] = (1, 1)
    shear: Fraction = 0
    fill: Byte = 0


class Second(Options):
    """What the second of two views has for its own. The defaults are BYOL's (Grill et al. 2020, table 6).

    crop: of the second view; null: the first's. blur: of the second view; null: none. solarize: of the second view;
    null: none. by_patch: of a jigsaw, which PIRL makes: whether
    flip and colours are drawn for each of its nine patches.
    """

    crop: Crop | None = None
    blur: Blur | None = Blur(probability=0.1)
    solarize: Solarize | None = Solarize()
    by_patch: bool = False


class Views(Options):
    """How many views of each image, how large, and what is done to each, in the order of the fields.

    count: of views of each image. size: pixels of both sides. crop: a random part of the image; null: the whole image,
    resized. interpolation: Pillow's, antialiased where the image shrinks. flip: the probability to be mirrored. affine:
    turns, shifts, scales and shears. jitter: changes colours. photometric: Pillow's operations on bytes. grey: the
    probability to lose the colours. blur: a Gaussian. solarize: inverts the lightest pixels. second: what the second of
    two views has for its own; null: it is as the first. ties: operations that the views of an image have in common:
    they are drawn once for all of them (LooC). mean: of the channels, subtracted from values in [0, 1]; ImageNet's.
    std: of the channels, which these are divided by; ImageNet's.
    """

    count: Annotated[int, Field(ge=1, le=64)] = 2
    size: Annotated[int, Field(ge=8, le=2048)] = 224
    crop: Crop | None = Crop()
    interpolation: Interpolation = "bilinear"
    flip: Probability = 0.5
    affine: Affine | None = None
    jitter: Jitter | None = Jitter()
    photometric: Photometric | None = None
    grey: Probability = 0.2
    blur: Blur | None = Blur()
    solarize: Solarize | None = None
    second: Second | None = None
    ties: tuple[Operation, ...] = ()
    mean: tuple[Fraction, Fraction, Fraction] = (0.485, 0.456, 0.406)
    std: tuple[PositiveFraction, PositiveFraction, PositiveFraction] = (0.229, 0.224, 0.225)

    @property
    def filter(self) -> int:
        """The interpolation's number in compiled loops."""
        return columns.BICUBIC if self.interpolation == "bicubic" else columns.BILINEAR

    @property
    def by_patch(self) -> bool:
        """Whether the second view is a jigsaw whose patches are flipped and coloured one by one."""
        return self.second is not None and self.second.by_patch

    @property
    def blur_kernel(self) -> int:
        """Pixels, odd."""
        return (self.blur and self.blur.kernel) or self.size // 10 | 1

    @model_validator(mode="after")
    def kernels_fit(self) -> Self:
        second, of_second = self.second_view(), ("view", self.size)
        if self.by_patch:
            of_second = "patch", patch_side(self.size)
        for name, views, (of, side) in (("blur", self, ("view", self.size)), ("second.blur", second, of_second)):
            if views.blur and views.blur_kernel > 2 * side - 1:
                raise ValueError(
                    f"{name}.kernel {views.blur_kernel} reaches past the reflection of a {of} of size {side}; "
                    f"use at most {2 * side - 1}"
                )
        return self

    @model_validator(mode="after")
    def second_of_two(self) -> Self:
        if self.second and self.count != 2:
            raise ValueError(f"second says what the second of two views has, and count is {self.count}; use 2")
        return self

    @model_validator(mode="after")
    def ties_of_several(self) -> Self:
        if self.ties and self.count == 1:
            raise ValueError("ties says what the views have in common, and count is 1; use [], or a larger count")
        if self.ties and self.by_patch:
            raise ValueError("ties has no meaning with second.by_patch, where each patch draws for itself; use ties []")
        return self

    def second_view(self) -> "Views":
        """The options of the second view."""
        if not self.second:
            return self
        own = {"blur": self.second.blur, "solarize": self.second.solarize, "crop": self.second.crop or self.crop}
        return self.model_copy(update=own)

    def first_view(self) -> "Views":
        """The options of the first view alone."""
        return self.model_copy(update={"count": 1, "second": None, "ties": ()})

    def patch_views(self) -> "Views":
        """The options of a jigsaw's patches, as views of an image: those of the second view, with its blur's kernel."""
        view = self.second_view()
        blur = view.blur and view.blur.model_copy(update={"kernel": view.blur_kernel})
        own = {"count": columns.PATCHES, "size": patch_side(self.size), "blur": blur, "second": None}
        return view.model_copy(update=own)

    def plan(self) -> NDArray[np.float32]:
        """(columns.COLUMNS,) the row of numbers that the compiled loops read; see data/views/columns.py."""
        plan = np.zeros(columns.COLUMNS, np.float32)

        def set_range(value: int, low: float, high: float) -> None:
            plan[columns.LOW + value], plan[columns.HIGH + value] = low, high

        if self.crop:
            plan[columns.CROP] = 1
            plan[columns.AREA_LOW], plan[columns.AREA_HIGH] = self.crop.scale
            plan[columns.RATIO_LOW], plan[columns.RATIO_HIGH] = self.crop.ratio
        plan[columns.FLIP] = self.flip
        if self.affine:
            set_range(columns.AFFINE, *done(self.affine.probability))
            set_range(columns.ANGLE, -self.affine.degrees, self.affine.degrees)
            set_range(columns.SHIFT_X, -self.affine.shift, self.affine.shift)
            set_range(columns.SHIFT_Y, -self.affine.shift, self.affine.shift)
            set_range(columns.SCALE, *self.affine.scale)
            set_range(columns.SHEAR, -self.affine.shear, self.affine.shear)
            plan[columns.FILL] = self.affine.fill
        if self.jitter:
            set_range(columns.JITTER, *done(self.jitter.probability))
            set_range(columns.ORDER, 0, math.factorial(4))
            for value, strength in (
                (columns.BRIGHTNESS, self.jitter.brightness),
                (columns.CONTRAST, self.jitter.contrast),
                (columns.SATURATION, self.jitter.saturation),
            ):
                set_range(value, max(0.0, 1 - strength), 1 + strength)
            set_range(columns.HUE, -self.jitter.hue, self.jitter.hue)
        if self.photometric:
            for value, range_ in self.photometric.ranges().items():
                set_range(value, *range_)
        set_range(columns.GREY, *done(self.grey))
        if self.blur:
            set_range(columns.BLUR, *done(self.blur.probability))
            set_range(columns.SIGMA, *self.blur.sigma)
            plan[columns.RADIUS] = self.blur_kernel // 2
            plan[columns.BORDER] = BORDERS[self.blur.border]
        if self.solarize:
            set_range(columns.SOLARIZE, *done(self.solarize.probability))
            set_range(columns.THRESHOLD, *self.solarize.thresholds)
        plan[columns.MEAN : columns.MEAN + 3] = 255 * np.array(self.mean)
        plan[columns.STD : columns.STD + 3] = 255 * np.array(self.std)
        return plan

    def plans(self) -> NDArray[np.float32]:
        """(count, columns.COLUMNS): each view's plan."""
        plans = np.tile(self.plan(), (self.count, 1))
        if self.second:
            plans[1] = self.second_view().plan()
            if self.by_patch:
                plans[1, columns.PATCH], plans[1, columns.PATCH_FLIP] = patch_side(self.size), self.flip
                plans[1, columns.FLIP] = 0
        for operation in self.ties:
            plans[:, columns.TIES[operation]] = 1
        return plans
