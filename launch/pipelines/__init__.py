"""Chains of runs: their folders, their stages, their results."""
