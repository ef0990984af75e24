"""Imports the TensorFlow checkpoints of SimCLR's authors, without TensorFlow."""
