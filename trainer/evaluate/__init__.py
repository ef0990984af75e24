"""Evaluators, a file for each under the name that recipes use, and what they share."""
