"""Measurements of `kilobatch bench`."""
