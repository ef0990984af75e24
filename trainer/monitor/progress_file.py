"""progress.json: how far a run is, for those who ask from outside. Loads no torch."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ValidationError

from kilobatch.trainer.monitor.progress_bar import Pace

EVERY = 5.0  # seconds between two writings
NAMES = {
    "train/loss": "loss",
    "train/images_per_second": "images_per_second",
    "train/data_wait": "data_wait",
    "knn/top1": "knn",
    "final/knn/top1": "knn",
    "classify/top1": "top1",
    "final/classify/top1": "top1",
}


class Standing(BaseModel):
    """time: when it was written, seconds since 1970; seconds_left: to the last step, at the speed since the start or
    the resume; loss, knn, top1 (of the method's own classifier): the newest; images_per_second: of all ranks;
    data_wait: share of the time."""

    step: int
    steps: int
    epoch: float
    epochs: int
    time: float
    seconds_left: float | None = None
    loss: float | None = None
    images_per_second: float | None = None
    data_wait: float | None = None
    knn: float | None = None
    top1: float | None = None

    @classmethod
    def of(cls, run: Path) -> "Standing | None":
        """None before a run's first steps, and where the file is no longer whole after a power failure."""
        try:
            return cls.model_validate_json((run / "progress.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def write(self, run: Path) -> None:
        """Renamed into place, not synced: a reader never sees a half, and training does not wait for the disk."""
        beside = run / f".progress.json.{os.getpid()}"
        beside.write_text(json.dumps(self.model_dump()))
        beside.replace(run / "progress.json")


class Stand:
    """Keeps progress.json: every EVERY seconds, at an evaluation's end and at the last step."""

    def __init__(self, run: Path, total_steps: int, start_step: int, epochs: int):
        self._run, self._total, self._epochs = run, total_steps, epochs
        self._start, self._step, self._pace = start_step, start_step, Pace(start_step, total_steps)
        before = Standing.of(run)
        self._newest = {"knn": before.knn, "top1": before.top1} if before else {}
        self._write()

    def move(self, step: int) -> None:
        self._step = step
        if step == self._total or time.monotonic() - self._written >= EVERY:
            self._write()

    def show(self, values: Mapping[str, float]) -> None:
        found = {NAMES[name]: value for name, value in values.items() if name in NAMES}
        self._newest |= found
        if "knn" in found or "top1" in found:
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        Standing(
            step=self._step,
            steps=self._total,
            epoch=self._step * self._epochs / self._total,
            epochs=self._epochs,
            time=time.time(),
            seconds_left=self._pace.seconds_left(self._step) if self._step > self._start else None,
            **self._newest,
        ).write(self._run)
