"""The tiled losses as Triton kernels. Nothing here is imported where data/kernels/chosen.py says no."""
