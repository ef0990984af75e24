"""Makes a run go on from an earlier checkpoint: sets the newer ones aside."""

import shutil
from itertools import count
from pathlib import Path

from kilobatch.data.errors import UserError
from kilobatch.trainer.checkpoint.description import list_checkpoints


def check_checkpoint(run: Path, step: int) -> Path:
    """The run's checkpoint of this step. Raises UserError where it has none that is whole. Reads every byte of it."""
    found = list_checkpoints(run / "checkpoints")
    if step not in found:
        steps = ", ".join(map(str, found)) or "none"
        raise UserError(f"--from {step}: {run} has no checkpoint of this step; there are: {steps}")
    from kilobatch.trainer.checkpoint.reader import open_saved  # loads torch

    open_saved(found[step])
    return found[step]


def set_newer_aside(run: Path, step: int) -> Path | None:
    """Moves the checkpoints of later steps, and a copy of metrics.jsonl, to a folder of their own in checkpoints/, so
    that the run goes on from this step and nothing is lost. Returns that folder; None where there is no newer one."""
    newer = [path for other, path in list_checkpoints(run / "checkpoints").items() if other > step]
    if not newer:
        return None
    names = (f"newer-than-{step:08d}" + (f"-{n}" if n > 1 else "") for n in count(1))
    aside = next(path for name in names if not (path := run / "checkpoints" / name).exists())
    aside.mkdir()
    if (metrics := run / "metrics.jsonl").is_file():
        shutil.copy2(metrics, aside)  # a resume cuts it off after the step
    for path in newer:
        path.rename(aside / path.name)
    return aside


def bring_back(run: Path, aside: Path) -> None:
    """Undoes what set_newer_aside did, where nothing was trained since."""
    for path in list_checkpoints(aside).values():
        path.rename(run / "checkpoints" / path.name)
    if (metrics := aside / "metrics.jsonl").is_file():
        metrics.replace(run / "metrics.jsonl")
    aside.rmdir()
