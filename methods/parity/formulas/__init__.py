"""Formulas of the papers in the plainest code, under the papers' names."""
