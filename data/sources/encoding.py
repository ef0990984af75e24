"""Options of a conversion: the largest size of images, the quality of JPEGs, the range of deep pixels."""

from dataclasses import dataclass

QUALITY = 90
RANGE_8_BITS = (0, 255)


@dataclass(frozen=True)
class Encoding:
    """The options of a conversion.

    max_side: pixels of the longer side, to which larger images are shrunk (None: not shrunk); min_side: but the shorter
    side is not shrunk below this; quality: of JPEGs, 1 to 100; value_range: of images with more than 8 bits, the values
    that become 0 and 255 (None: to be measured over all files); measured: whether that is what they were, so that
    they say nothing of floating-point images.
    """

    max_side: int | None = None
    min_side: int | None = None
    quality: int = QUALITY
    value_range: tuple[float, float] | None = None
    measured: bool = False

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height, in pixels, to which an image of this width and height is shrunk."""
        scale = 1.0
        if self.max_side is not None:
            scale = min(1.0, max(self.max_side / max(width, height), (self.min_side or 0) / min(width, height)))
        return max(1, round(width * scale)), max(1, round(height * scale))


def encoding_for_views(size: int) -> Encoding:
    """What views of this many pixels lose nothing by: at 224, 512 on the longer side (a crop of a fifth of such a
    square has as many pixels as a view) and 256 on the shorter one (of which evaluation shows the central 224)."""
    return Encoding(max_side=max(512, -(-size * 16 // 7)), min_side=max(256, -(-size * 8 // 7)))
