"""Reads and writes progress.json, a run's progress for other processes. Loads no torch."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from kilobatch.data.files import refusing_os_errors

EVERY = 5.0  # seconds between two writings
NAMES = {
    "train/loss": "loss",
    "train/images_per_second": "images_per_second",
    "train/data_wait": "data_wait",
    "knn/top1": "knn",
    "final/knn/top1": "knn",
    "knn_sample/top1": "knn_sample",
    "final/knn_sample/top1": "knn_sample",
    "classify/top1": "top1",
    "final/classify/top1": "top1",
}


NoteKind = Literal["loss", "knn", "collapse", "views", "assignments", "queue"]


class Note(BaseModel):
    """A remark on how a training learns. kind: queue: a normal rise of the loss; all others are warnings; step: at
    which it was first so; text: a clause."""

    kind: NoteKind
    step: int
    text: str

    @property
    def warns(self) -> bool:
        return self.kind != "queue"

    def __str__(self) -> str:
        return f"{'warning' if self.warns else 'note'} (from step {self.step} on): {self.text}"


class Progress(BaseModel):
    """The progress of a run.

    time: when it was written, seconds since 1970; seconds_left: to the last step, at the speed since the end of the
    first one after the start or the resume; loss, knn, knn_sample (on the images of the baselines, where these are a
    sample), top1 (of the method's own classifier): the newest values; notes: on how it learns, as it is now;
    images_per_second: of all ranks, and data_wait, the share of the time spent waiting for data: since that step.
    """

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
    knn_sample: float | None = None
    top1: float | None = None
    notes: list[Note] = []

    @classmethod
    def of(cls, run: Path) -> "Progress | None":
        """The progress of the run in this folder.

        None before a run's first steps, and where the file is damaged or cannot be read.
        """
        try:
            return cls.model_validate_json((run / "progress.json").read_bytes())
        except (OSError, ValidationError):
            return None

    def write(self, run: Path) -> None:
        """Writes the file under another name and renames it, so that a reader never sees half of it.

        It is not synced: training does not wait for the disk. Raises UserError where it cannot be written.
        """
        temporary, path = run / f".progress.json.{os.getpid()}", run / "progress.json"
        with refusing_os_errors(path):
            try:
                temporary.write_text(json.dumps(self.model_dump()))
                temporary.replace(path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise


class ProgressWriter:
    """Writes progress.json every EVERY seconds, at an evaluation's end and at the last step."""

    def __init__(self, run: Path, total_steps: int, start_step: int, epochs: int):
        self._run, self._total, self._epochs = run, total_steps, epochs
        self._step: int = start_step
        self._seconds_left: float | None = None
        earlier = Progress.of(run)
        self.notes = earlier.notes if earlier else []
        self._newest = {name: getattr(earlier, name) for name in ("knn", "knn_sample", "top1")} if earlier else {}
        self._write()

    def move(self, step: int, seconds_left: float | None) -> None:
        self._step, self._seconds_left = step, seconds_left
        if step == self._total or time.monotonic() - self._written >= EVERY:
            self._write()

    def show(self, values: Mapping[str, float]) -> None:
        shown = {NAMES[name]: value for name, value in values.items() if name in NAMES}
        self._newest |= shown
        if "knn" in shown or "top1" in shown:
            self._write()

    def note(self, notes: list[Note]) -> None:
        """Takes the notes as they are now, and writes them where others are among them."""
        others = {note.kind for note in notes} != {note.kind for note in self.notes}
        self.notes = notes
        if others:
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        Progress(
            step=self._step,
            steps=self._total,
            epoch=self._step * self._epochs / self._total,
            epochs=self._epochs,
            time=time.time(),
            seconds_left=self._seconds_left,
            notes=self.notes,
            **self._newest,
        ).write(self._run)
