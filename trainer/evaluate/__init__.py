"""Evaluators, each a file that yields (name, value) and that recipes ask for by its name; and what they share."""
