"""Batches to an encoder: the loop, one step, the engine."""
