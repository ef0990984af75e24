"""Numbers of a view's random draws, and columns of its plan: the row of float32 that gives compiled loops the ranges.

Draw numbers of a view's key:

    0-39    crop: attempt a draws 4a area, 4a + 1 ratio, 4a + 2 top, 4a + 3 left
    40      flip
    64 + j  drawn value j of the table below
    1024-   jigsaw: 9 that order the patches, 9 of their tops, 9 of their left edges
    2048-   jigsaw coloured by patch: keys of the patches at the 9 places, of which flip and colours are drawn

A drawn value is low + (high - low) * u, u uniform in [0, 1). An operation of probability p has a value of its own with
the range from p to p - 1: it is done where the value is above zero. New values are added at the end of the table, so
that each keeps its draw number, and a recipe its images.
"""

import numpy as np

GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # of red, green and blue in a pixel's grey

BILINEAR, BICUBIC = 0, 1  # filters that resize
REFLECT, ZERO, EDGE = 0, 1, 2  # what a blur sees beyond a view's border

FLIP_DRAW = 40
FIRST_DRAW = 64
JIGSAW_DRAW = 1024
PATCH_DRAW = 2048

GRID = 3  # patches of a jigsaw in a row
PATCHES = GRID * GRID

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
PHOTOMETRIC = 16  # done if > 0: Pillow's operations on bytes, of which each is done if its own value is > 0, too
POSTERIZE = 17
BITS = 18  # its floor is how many are kept
SHARPEN = 19
SHARPNESS = 20  # factor
SOLARIZE_EARLY = 21  # before grey and blur, with the threshold that follows; SOLARIZE comes after them
EARLY_THRESHOLD = 22
AUTOCONTRAST = 23
EQUALIZE = 24
THRESHOLD = 25  # 0..256: SOLARIZE inverts this level and all above
VALUES = 26  # how many

# Columns of the plan: the low end of each drawn value, the high end of each, and all other parameters
LOW = 0
HIGH = LOW + VALUES
CROP = HIGH + VALUES  # 1 to crop, 0 to take the whole image
AREA_LOW = CROP + 1  # fractions of the image's area
AREA_HIGH = CROP + 2
RATIO_LOW = CROP + 3  # width / height
RATIO_HIGH = CROP + 4
FLIP = CROP + 5  # probability
RADIUS = CROP + 6  # of the blur's kernel, pixels
BORDER = CROP + 7  # REFLECT, ZERO or EDGE, of the blur
FILL = CROP + 8  # 0..255: an affine move's pixels from outside the image
PATCH = CROP + 9  # side of a jigsaw's patches, where they are coloured one by one; else 0
PATCH_FLIP = CROP + 10  # probability, of each patch
TIED_CROP = CROP + 11  # 1: drawn by the key of the group's first view, so that all of them have the same
TIED_FLIP = CROP + 12
TIED = CROP + 13  # the same of each drawn value
MEAN = TIED + VALUES  # three numbers, as STD; 0..255
STD = MEAN + 3
COLUMNS = STD + 3

# What is tied for each operation that `ties` may name: columns of the plan
TIES = {
    "crop": (TIED_CROP,),
    "flip": (TIED_FLIP,),
    "affine": tuple(range(TIED + AFFINE, TIED + SHEAR + 1)),
    "jitter": tuple(range(TIED + JITTER, TIED + HUE + 1)),
    "photometric": tuple(range(TIED + PHOTOMETRIC, TIED + EQUALIZE + 1)),
    "grey": (TIED + GREY,),
    "blur": (TIED + BLUR, TIED + SIGMA),
    "solarize": (TIED + SOLARIZE, TIED + THRESHOLD),
}

# Columns of a view's row of integers: where it lies in a batch of n images. Groups lie one after the other, each as
# (n, V, ...), so that view v of image i begins at n * BEFORE + i * EACH + WITHIN.
SIZE = 0  # pixels of a side
INTERPOLATION = 1  # BILINEAR or BICUBIC
FIRST = 2  # the number of its group's first view
BEFORE = 3  # elements of an image's views in the groups before
EACH = 4  # elements of an image's views in this group
WITHIN = 5  # elements of those before it in this group
ROW_COLUMNS = 6

# The 24 orders of the four jitter operations, numbered as in torchvision's ColorJitter
DO_BRIGHTNESS, DO_CONTRAST, DO_SATURATION, DO_HUE = range(4)
ORDERS = np.array(
    [[a, b, c, 6 - a - b - c] for a in range(4) for b in range(4) for c in range(4) if len({a, b, c}) == 3]
)
