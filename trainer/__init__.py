"""Turns batches into a trained encoder: step, loop, engine, optimizers, checkpoints, evaluators, monitor."""
