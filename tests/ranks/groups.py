"""Real gloo process groups for tests."""

from trainer.ranks import run_ranks

__all__ = ["run_ranks"]
