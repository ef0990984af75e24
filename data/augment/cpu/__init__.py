"""Augmentation on CPUs: loops that numba compiles."""
