"""Writes, reads, describes and exports checkpoints."""
