"""Reads metrics.jsonl, and cuts it back to where a resumed training goes on. Loads no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kilobatch.data.errors import warn
from kilobatch.data.files import parse_json


def read_metrics(metrics: Path) -> Iterator[dict[str, Any]]:
    """The lines of the file, in order. What is damaged, or was cut off by a kill, is passed over."""
    with metrics.open("rb") as file:
        yield from (values for line in file if (values := _values(line)) is not None)


def truncate_metrics(metrics: Path, start_step: int) -> None:
    """Removes the lines of metrics.jsonl from the first one that a run resumed at start_step writes again.

    That is a line of a later step, an evaluation of start_step itself (the loop repeats it), or a line that a kill left
    half-written. A damaged line before it stays as it is, with a warning: the training does not need it.
    """
    if not metrics.exists():
        return
    kept_bytes, damaged, end = 0, 0, 0
    with metrics.open("r+b") as file:
        for line in file:
            end += len(line)
            values = _values(line)
            if values is None:
                continue
            if (values["step"], "train/loss" not in values) > (start_step, False):
                break
            damaged += end - kept_bytes > len(line)
            kept_bytes = end
        file.truncate(kept_bytes)
    if damaged:
        warn(f"{metrics} has damaged lines in {damaged} place{'s' * (damaged > 1)}; they are left as they are")


def _values(line: bytes) -> dict[str, Any] | None:
    """The values of a whole line; None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        values = parse_json(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and type(values.get("step")) is int else None
