"""Schedulers of jobs: SLURM, or this machine in its place; loads no torch."""
