"""Baselines of a run: k-NN of raw pixels and of the untrained encoder, which a trained one is compared with."""
