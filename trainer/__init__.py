"""Trains an encoder on batches: the loop, one step, the engine."""
