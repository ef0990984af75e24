"""Runs as jobs of a cluster: asked for, submitted, attempted, requeued."""
