"""The images of a plan: how many pixels they have, and how long a core takes to make views of one. Loads no torch."""

from dataclasses import dataclass
from pathlib import Path

from kilobatch.data.beton import read_jpeg_pixels
from kilobatch.data.errors import UserError
from kilobatch.data.sources.convert import kept_conversion
from kilobatch.data.sources.encoding import encoding_for_views
from kilobatch.data.sources.specs import is_beton
from kilobatch.data.views.groups import ViewGroups, groups_of, largest_side
from kilobatch.launch.planning.machines import VIEWS_PER_CORE, Measured
from kilobatch.launch.recipes.recipe import Recipe

# Of the photographs with which rates are measured: their longer side, and the share of its square that they fill.
MEASURED_SIDE, FILLED = 256, 0.79
MEASURED_VIEW = 224  # pixels of a side of the views that are measured
# Share of the time of two such views, cut out and flipped, that goes into decoding the photograph: docs/measured.md.
DECODING = 0.87
# The longer side where nothing is known: of ImageNet's photographs after convert --max-side 512 --min-side 256.
ASSUMED_SIDE = 341
STORED_RAW = ("digits", "cifar10", "cifar100")  # sources of small images, which are stored as they are


@dataclass(frozen=True)
class Photos:
    """pixels: of an image in the mean, as far as they have to be decoded from a JPEG; source: how that is known."""

    pixels: float
    source: str

    def seconds(self, views: ViewGroups, gpu: bool, measured: Measured | None) -> float:
        """Seconds of a core for all views of an image, at the assumed rates or at the measured one. gpu: colours are
        changed there."""
        cut = 1 / VIEWS_PER_CORE["cuda"]
        decode = 2 * DECODING * cut * self.pixels / (FILLED * MEASURED_SIDE**2)
        each = (1 - DECODING) * cut if gpu else 1 / VIEWS_PER_CORE["cpu"] - DECODING * cut
        assumed = decode + sum(group.count * each * (group.size / MEASURED_VIEW) ** 2 for group in groups_of(views))
        return assumed if measured is None else assumed * VIEWS_PER_CORE["cuda" if gpu else "cpu"] / measured.views


def photos_of(recipe: Recipe, side: int | None) -> Photos:
    """What is known of data.train. side: the longer one as the command line gives it. Raises UserError for less than
    one pixel, and for a damaged .beton."""
    if side is not None:
        if side < 1:
            raise UserError(f"--photo-side is {side}; it should be 1 or more")
        return Photos(FILLED * side**2, f"photographs of {side} pixels on the longer side (--photo-side)")
    spec = recipe.data.train
    if (file := _converted(recipe)) is not None:
        pixels = read_jpeg_pixels(file)
        if pixels:
            return Photos(pixels, f"photographs of {pixels:,.0f} pixels in the mean, as {file} has them")
    if file is not None or spec.partition(":")[0] in STORED_RAW:
        return Photos(0, f"images that are stored as they are, and need no decoding ({spec})")
    return Photos(
        FILLED * ASSUMED_SIDE**2,
        f"photographs of {ASSUMED_SIDE} pixels on the longer side, an assumption (--photo-side says otherwise)",
    )


def _converted(recipe: Recipe) -> Path | None:
    """The .beton of data.train, where it is on this machine already."""
    spec = recipe.data.train
    if is_beton(spec):
        path = Path(spec).expanduser()
        return path if path.is_file() else None
    try:
        return kept_conversion(spec, "train", encoding_for_views(largest_side(recipe.data.groups)))
    except UserError:  # its images are not on this machine, which has been said or is meant
        return None
