"""Batches: order of the samples, decoding, prefetching, the loader."""
