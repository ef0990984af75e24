"""Evaluators: each is one small file that yields (name, value)."""

from kilobatch.trainer.evaluate.options import EvaluateOptions

__all__ = ["EvaluateOptions"]
