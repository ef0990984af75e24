"""Checkpoints written, read, described, exported."""
