"""A chain of runs: its folder, its stages, its results."""
