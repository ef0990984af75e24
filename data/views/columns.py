"""What chance decides in a view, by number; and the plan, a row of float32 that tells compiled loops its ranges.

Draw numbers of a view's key:

    0-39    crop: attempt a draws 4a area, 4a + 1 ratio, 4a + 2 top, 4a + 3 left
    40      flip
    64 + j  drawn value j of the table below
    1024-   jigsaw: 9 that order the patches, 9 of their tops, 9 of their left edges

A drawn value is low + (high - low) * u. An operation of probability p has a value of its own with the range from p to
p - 1, so that it is done where its value is above zero. New values go to the end of the table: each keeps its draw
number, and a recipe its images.
"""

import numpy as np

FLIP_DRAW = 40
FIRST_DRAW = 64
JIGSAW_DRAW = 1024

# Drawn values
JITTER = 0  # done if > 0
ORDER = 1  # [0, 24): its floor is a row of ORDERS
BRIGHTNESS = 2  # factors, ...
CONTRAST = 3
SATURATION = 4
HUE = 5  # ... and turns of the colour circle
GREY = 6  # done if > 0
BLUR = 7  # done if > 0
SIGMA = 8  # pixels
SOLARIZE = 9  # done if > 0
AFFINE = 10  # done if > 0
ANGLE = 11  # degrees, clockwise
SHIFT_X = 12  # fractions of the side
SHIFT_Y = 13
SCALE = 14  # above one enlarges
SHEAR = 15  # tangent, along x
DRAWN = 16

# Columns of the plan: the low end of each drawn value, the high end of each, and what is not drawn so
LOW = 0
HIGH = LOW + DRAWN
CROP = HIGH + DRAWN  # 1 to crop, 0 to take the whole image
AREA_LOW = CROP + 1  # fractions of the image's area
AREA_HIGH = CROP + 2
RATIO_LOW = CROP + 3  # width / height
RATIO_HIGH = CROP + 4
FLIP = CROP + 5  # probability
RADIUS = CROP + 6  # of the blur's kernel, pixels
THRESHOLD = CROP + 7  # 0..255: solarize inverts from here on
FILL = CROP + 8  # 0..255: what an affine move brings in from outside
MEAN = CROP + 9  # three each, 0..255
STD = CROP + 12
COLUMNS = CROP + 15

# The 24 orders of the four jitter operations, numbered as in torchvision's ColorJitter
DO_BRIGHTNESS, DO_CONTRAST, DO_SATURATION, DO_HUE = range(4)
ORDERS = np.array(
    [[a, b, c, 6 - a - b - c] for a in range(4) for b in range(4) for c in range(4) if len({a, b, c}) == 3]
)
