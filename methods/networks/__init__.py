"""Encoders, heads, norms."""
