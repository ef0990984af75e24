"""Clusters of all training samples, made over ranks, and what methods make of them."""
