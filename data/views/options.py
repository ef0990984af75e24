"""Options of views, recipe section `data.views`: crop, colours, blur and the rest. The defaults are SimCLR's."""

import math
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from kilobatch.data.views import columns


def ascending(pair: tuple[float, float]) -> tuple[float, float]:
    low, high = pair
    if low > high:
        raise ValueError(f"({low}, {high}) runs backwards; give the smaller number first: ({high}, {low})")
    return pair


Probability = Annotated[float, Field(ge=0, le=1)]
Byte = Annotated[float, Field(ge=0, le=255)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]  # of an area
Ratio = Annotated[float, Field(ge=0.01, le=100)]  # a ratio of two lengths
Sigma = Annotated[float, Field(ge=0.01, le=100)]
Strength = Annotated[float, Field(ge=0, le=10)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Interpolation = Literal["bilinear", "bicubic"]


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Crop(Options):
    """A random part of the image, resized: torchvision's RandomResizedCrop."""

    scale: Annotated[tuple[PositiveFraction, PositiveFraction], AfterValidator(ascending)] = (
        0.08,
        1.0,
    )  # of the image's area
    ratio: Annotated[tuple[Ratio, Ratio], AfterValidator(ascending)] = (3 / 4, 4 / 3)  # width / height


class Jitter(Options):
    """Colours: with one probability all four, in a random order: factors from [max(0, 1 - x), 1 + x], hue [-x, x]."""

    probability: Probability = 0.8
    brightness: Strength = 0.8
    contrast: Strength = 0.8
    saturation: Strength = 0.8
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2  # turns of the colour circle


class Blur(Options):
    """Gaussian, with reflected borders."""

    probability: Probability = 0.5
    sigma: Annotated[tuple[Sigma, Sigma], AfterValidator(ascending)] = (0.1, 2.0)  # pixels
    kernel: Annotated[int, Field(ge=1, le=999)] | None = None  # pixels, odd; without: a tenth of the size

    @model_validator(mode="after")
    def odd(self) -> Self:
        if self.kernel is not None and self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} is even and has no centre; use {self.kernel + 1}")
        return self


class Solarize(Options):
    """Pixels from the threshold on are inverted."""

    probability: Probability = 0.2
    threshold: Byte = 128


class Affine(Options):
    """Moves about the image's centre: turn, shift, scale and shear, each drawn uniformly, read bilinearly."""

    probability: Probability = 1.0
    degrees: Annotated[float, Field(ge=0, le=180)] = 0  # turned by up to this, either way
    shift: Fraction = 0  # of the side, either way, across and down
    scale: Annotated[tuple[Ratio, Ratio], AfterValidator(ascending)] = (1, 1)
    shear: Fraction = 0  # tangent, either way, along x
    fill: Byte = 0  # what comes in from outside


class Second(Options):
    """What the second of two views has for its own. The defaults are BYOL's (Grill et al. 2020, table 6)."""

    crop: Crop | None = None  # without: the first's
    blur: Blur | None = Blur(probability=0.1)
    solarize: Solarize | None = Solarize()


class Views(Options):
    """How many views of each image, how large, and what is done to each, in the order of the fields."""

    count: Annotated[int, Field(ge=1, le=64)] = 2
    size: Annotated[int, Field(ge=8, le=2048)] = 224  # pixels, of both sides
    crop: Crop | None = Crop()  # without: the whole image, resized
    interpolation: Interpolation = "bilinear"  # Pillow's, antialiased where the image shrinks
    flip: Probability = 0.5
    affine: Affine | None = None
    jitter: Jitter | None = Jitter()
    grey: Probability = 0.2
    blur: Blur | None = Blur()
    solarize: Solarize | None = None
    second: Second | None = None  # of two views; without: as the first
    mean: tuple[Fraction, Fraction, Fraction] = (0.485, 0.456, 0.406)  # ImageNet's, of values in [0, 1]
    std: tuple[PositiveFraction, PositiveFraction, PositiveFraction] = (0.229, 0.224, 0.225)

    @property
    def filter(self) -> int:
        """The interpolation's number in compiled loops."""
        return columns.BICUBIC if self.interpolation == "bicubic" else columns.BILINEAR

    @property
    def blur_kernel(self) -> int:
        """Pixels, odd."""
        return (self.blur and self.blur.kernel) or self.size // 10 | 1

    @model_validator(mode="after")
    def kernels_fit(self) -> Self:
        for name, views in (("blur", self), ("second.blur", self.second_view())):
            if views.blur and views.blur_kernel > 2 * self.size - 1:
                raise ValueError(
                    f"{name}.kernel {views.blur_kernel} reaches past the reflection of a view of size {self.size}; "
                    f"use at most {2 * self.size - 1}"
                )
        return self

    @model_validator(mode="after")
    def second_of_two(self) -> Self:
        if self.second and self.count != 2:
            raise ValueError(f"second says what the second of two views has, and count is {self.count}; use 2")
        return self

    def second_view(self) -> "Views":
        """The options of the second view."""
        if not self.second:
            return self
        own = {"blur": self.second.blur, "solarize": self.second.solarize, "crop": self.second.crop or self.crop}
        return self.model_copy(update=own)

    def plan(self) -> NDArray[np.float32]:
        """(columns.COLUMNS,) the row of numbers that the compiled loops read; see data/views/columns.py."""
        plan = np.zeros(columns.COLUMNS, np.float32)

        def set_range(value: int, low: float, high: float) -> None:
            plan[columns.LOW + value], plan[columns.HIGH + value] = low, high

        def set_probability(value: int, probability: float) -> None:
            set_range(value, probability, probability - 1)

        if self.crop:
            plan[columns.CROP] = 1
            plan[columns.AREA_LOW], plan[columns.AREA_HIGH] = self.crop.scale
            plan[columns.RATIO_LOW], plan[columns.RATIO_HIGH] = self.crop.ratio
        plan[columns.FLIP] = self.flip
        if self.affine:
            set_probability(columns.AFFINE, self.affine.probability)
            set_range(columns.ANGLE, -self.affine.degrees, self.affine.degrees)
            set_range(columns.SHIFT_X, -self.affine.shift, self.affine.shift)
            set_range(columns.SHIFT_Y, -self.affine.shift, self.affine.shift)
            set_range(columns.SCALE, *self.affine.scale)
            set_range(columns.SHEAR, -self.affine.shear, self.affine.shear)
            plan[columns.FILL] = self.affine.fill
        if self.jitter:
            set_probability(columns.JITTER, self.jitter.probability)
            set_range(columns.ORDER, 0, math.factorial(4))
            for value, strength in (
                (columns.BRIGHTNESS, self.jitter.brightness),
                (columns.CONTRAST, self.jitter.contrast),
                (columns.SATURATION, self.jitter.saturation),
            ):
                set_range(value, max(0.0, 1 - strength), 1 + strength)
            set_range(columns.HUE, -self.jitter.hue, self.jitter.hue)
        set_probability(columns.GREY, self.grey)
        if self.blur:
            set_probability(columns.BLUR, self.blur.probability)
            set_range(columns.SIGMA, *self.blur.sigma)
            plan[columns.RADIUS] = self.blur_kernel // 2
        if self.solarize:
            set_probability(columns.SOLARIZE, self.solarize.probability)
            plan[columns.THRESHOLD] = self.solarize.threshold
        plan[columns.MEAN : columns.MEAN + 3] = 255 * np.array(self.mean)
        plan[columns.STD : columns.STD + 3] = 255 * np.array(self.std)
        return plan

    def plans(self) -> NDArray[np.float32]:
        """(count, columns.COLUMNS): each view's plan."""
        plans = np.tile(self.plan(), (self.count, 1))
        if self.second:
            plans[1] = self.second_view().plan()
        return plans
