"""The folder of the programs that tests start with `python -m`, for PYTHONPATH."""

from pathlib import Path

PROGRAMS = Path(__file__).parents[1] / "programs"
