"""Recipes, one YAML each; no code."""
