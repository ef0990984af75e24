"""Losses that papers share, and their kernels."""
