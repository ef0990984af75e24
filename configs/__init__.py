"""Recipes, one YAML file each; no code."""
