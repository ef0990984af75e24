"""Triton's kernels for an accelerator. Nothing here is imported where data/kernels/chosen.py says no."""
