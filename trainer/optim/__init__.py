"""Optimizers, learning-rate schedules, and ZeRO's partitions of parameters."""
