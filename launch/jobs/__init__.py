"""Submits runs as jobs of a cluster, runs their attempts, and requeues them."""
