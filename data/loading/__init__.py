"""Batches: order, decoding, prefetching, the loader."""
