"""Recipes read, validated, checked; no torch."""
