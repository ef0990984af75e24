"""Estimates memory, traffic and time of a run without its machines."""
