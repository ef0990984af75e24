"""Optimizers, schedules, and where ZeRO keeps what they update."""
