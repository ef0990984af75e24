"""Real gloo process groups for tests."""

from kilobatch.trainer.ranks.spawn import PRELOAD, run_ranks

__all__ = ["PRELOAD", "run_ranks"]

# What test modules import as well. A process has one fork server, which loads what its first caller says: whoever else
# among the tests has processes forked names the same.
PRELOAD.append("pytest")
