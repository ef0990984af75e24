"""Options of what a view's colours go through by Pillow's rules, as bytes; and what all options of views share."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from kilobatch.data.views import columns


def ascending(pair: tuple[float, float]) -> tuple[float, float]:
    low, high = pair
    if low > high:
        raise ValueError(f"({low}, {high}) runs backwards; give the smaller number first: ({high}, {low})")
    return pair


Probability = Annotated[float, Field(ge=0, le=1)]
Byte = Annotated[float, Field(ge=0, le=255)]
Threshold = Annotated[float, Field(ge=0, le=256)]  # no level of a byte reaches 256
ThresholdRange = Annotated[tuple[Threshold, Threshold], AfterValidator(ascending)]
NumberOrRange = Annotated[  # by its form, so that a message is about the one that was meant
    Annotated[Byte, Tag("number")] | Annotated[ThresholdRange, Tag("range")],
    Discriminator(lambda given: "range" if isinstance(given, list | tuple) else "number"),
]
Bits = Annotated[int, Field(ge=1, le=8)]
Strength = Annotated[float, Field(ge=0, le=10)]


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def done(probability: float) -> tuple[float, float]:
    """The range of a value that is above zero with this probability."""
    return probability, probability - 1


class Solarize(Options):
    """Pixels from the threshold on are inverted.

    probability: that a view is solarized. threshold: one number, or two between which it is drawn.
    """

    probability: Probability = 0.2
    threshold: NumberOrRange = 128

    @property
    def thresholds(self) -> tuple[float, float]:
        """The range from which the threshold is drawn."""
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold, self.threshold)


class Posterize(Options):
    """Of the eight bits of a byte only the highest are kept.

    probability: that a view is posterized. bits: the range from which their number is drawn.
    """

    probability: Probability = 1.0
    bits: Annotated[tuple[Bits, Bits], AfterValidator(ascending)] = (4, 8)


class Sharpness(Options):
    """The view mixed with itself smoothed over 3x3 pixels.

    probability: that a view is changed. factor: its range: 0 is smoothed, 1 as it was, above is sharpened.
    """

    probability: Probability = 1.0
    factor: Annotated[tuple[Strength, Strength], AfterValidator(ascending)] = (0.1, 1.9)


class Photometric(Options):
    """Pillow's operations on bytes, in the order of the fields: with one probability all, each with its own.

    The view is rounded to bytes first; what follows is Pillow's to the bit. vissl's ImgPilRandomPhotometric, which is
    PIRL's: probability 0.66, posterize and sharpness as by default, solarize with probability 1 at a threshold from 0
    to 256, autocontrast 1.

    probability: that any of them is done. posterize: fewer bits. sharpness: smoothed or sharpened. solarize: inverted
    from a threshold on. autocontrast: the probability that each channel is stretched to 0..255. equalize: the
    probability that each channel's levels are spread evenly.
    """

    probability: Probability = 1.0
    posterize: Posterize | None = None
    sharpness: Sharpness | None = None
    solarize: Solarize | None = None
    autocontrast: Probability = 0
    equalize: Probability = 0

    def ranges(self) -> dict[int, tuple[float, float]]:
        """The range of each drawn value; data/views/columns.py numbers them."""
        ranges = {columns.PHOTOMETRIC: done(self.probability)}
        if self.posterize:
            low, high = self.posterize.bits
            ranges |= {columns.POSTERIZE: done(self.posterize.probability), columns.BITS: (low, high + 1)}
        if self.sharpness:
            ranges |= {columns.SHARPEN: done(self.sharpness.probability), columns.SHARPNESS: self.sharpness.factor}
        if self.solarize:
            ranges[columns.SOLARIZE_EARLY] = done(self.solarize.probability)
            ranges[columns.EARLY_THRESHOLD] = self.solarize.thresholds
        return ranges | {columns.AUTOCONTRAST: done(self.autocontrast), columns.EQUALIZE: done(self.equalize)}
