"""What is asked of SLURM, or of this machine in its place; no torch."""
