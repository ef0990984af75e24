"""Reads, validates and checks recipes; loads no torch."""
