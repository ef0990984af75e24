"""Augmentation of views after they are cropped: colour, blur, affine moves and the rest."""
