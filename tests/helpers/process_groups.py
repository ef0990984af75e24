"""Real gloo process groups for tests."""

from kilobatch.trainer.ranks.spawn import PRELOAD, run_ranks

__all__ = ["PRELOAD", "run_ranks"]

# Test modules import pytest as well. A process has one fork server, which preloads the modules that its first caller
# names, so all tests that fork processes must name the same PRELOAD.
PRELOAD.append("pytest")
