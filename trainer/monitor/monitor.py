"""Writes metrics.jsonl, progress.json, TensorBoard, pictures and lines on the terminal, on rank 0."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from torch import Tensor

from kilobatch.data.files import refusing_os_errors, write_whole
from kilobatch.data.sources.path_names import printable, without_wnid
from kilobatch.trainer.evaluate.image_sample import ImageSample
from kilobatch.trainer.evaluate.images import Triple, grid, png, stacked, to_bytes
from kilobatch.trainer.monitor.learning import LearningChecks, LearningFacts
from kilobatch.trainer.monitor.metrics_file import truncate_metrics
from kilobatch.trainer.monitor.progress_bar import Bar, Eta, Lines
from kilobatch.trainer.monitor.progress_file import ProgressWriter

# The values that differ between two equal runs; all others are the same.
TIMINGS = ("train/seconds", "train/images_per_second", "train/data_wait")
VIEWS_SHOWN = 16  # samples in the grid of views


class Monitor:
    """The logs in a run's folder; a resumed run continues them after step start_step.

    Lines that a killed run wrote after its last checkpoint are removed, so that metrics.jsonl ends up the same as
    without the kill. TensorBoard is told to hide such steps as well. facts: for the checks whether it learns.

    All methods raise UserError where a file cannot be written, as on a full disk.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        start_step: int,
        epochs: int,
        console: Console | None = None,
        facts: LearningFacts | None = None,
    ):
        from torch.utils.tensorboard import SummaryWriter

        console = console or Console(soft_wrap=True, emoji=False)
        self.folder, self.total_steps = folder, total_steps
        self._metrics, self._events = folder / "metrics.jsonl", folder / "tensorboard"
        with refusing_os_errors(self._metrics):
            folder.mkdir(parents=True, exist_ok=True)
            truncate_metrics(self._metrics, start_step)
            self._lines = self._metrics.open("a", encoding="utf-8")
        with refusing_os_errors(self._events):
            purge = start_step + 1 if start_step else None
            self._tensorboard = SummaryWriter(str(self._events), purge_step=purge, flush_secs=10)
        self._display = Bar(console, total_steps, start_step) if console.is_terminal else Lines(console, total_steps)
        self._progress_file = ProgressWriter(folder, total_steps, start_step, epochs)
        self._eta = Eta(total_steps)
        # Of all intervals but the first, whose first step also compiles and allocates: images, seconds, and seconds of
        # these in which the data were waited for.
        self._totals: list[float] | None = None
        self.begin_interval()
        earlier = self._progress_file.notes
        self._learning = LearningChecks(self._metrics, total_steps, start_step, facts or LearningFacts(), earlier)
        self._progress_file.note(self._learning.standing)

    def count(self, images: int, waited: float) -> None:
        """Counts a step that has ended. images: of all ranks; waited: seconds that the step waited for its batch."""
        self._images += images
        self._waited += waited

    def progress(self, step: int) -> None:
        """Shows how far the training is after a step, which has been counted and, where it is due, logged."""
        seconds_left = self._eta.seconds_left(step)
        self._display.move(step, seconds_left)
        self._progress_file.move(step, seconds_left)

    def begin_interval(self) -> None:
        """Begins the interval that the next rates() are of, so that what went before counts in none."""
        self._since, self._images, self._waited = time.perf_counter(), 0, 0.0

    def rates(self) -> dict[str, float]:
        """TIMINGS of the interval since the last call: seconds, images per second of all ranks, share of the time spent
        waiting."""
        seconds = time.perf_counter() - self._since
        values = (seconds, self._images / seconds, self._waited / seconds)
        if self._totals is None:
            self._totals = [0.0, 0.0, 0.0]
        else:
            added = (self._images, seconds, self._waited)
            self._totals = [a + b for a, b in zip(self._totals, added, strict=True)]
        self.begin_interval()
        return dict(zip(TIMINGS, values, strict=True))

    def _running(self, values: Mapping[str, float]) -> dict[str, float]:
        """The values as they are shown: rates are those since the end of the first step, without evaluations."""
        shown = {name: value for name, value in values.items() if name not in TIMINGS}
        if "train/loss" in values and self._totals is not None and self._totals[1]:
            images, seconds, waited = self._totals
            shown |= dict(zip(TIMINGS, (seconds, images / seconds, waited / seconds), strict=True))
        return shown

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line of metrics.jsonl, flushed, and TensorBoard's scalars. Floats are exact (repr).

        TensorBoard gets names of the form `group/name` only: any other, such as an evaluation's epoch, would be shown
        as a group of its own.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        with refusing_os_errors(self._metrics):
            self._lines.write(json.dumps({"step": step, **values}) + "\n")
            self._lines.flush()
        grouped = {name: value for name, value in values.items() if "/" in name}
        # One event for all values: add_scalar writes one for each, 160 of them with the trust ratios of LARS.
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in grouped.items()])
        assert self._tensorboard.file_writer is not None, "the writer exists until close()"
        with refusing_os_errors(self._events):
            self._tensorboard.file_writer.add_summary(summary, step)
        shown = self._running(values)
        self._display.show(shown)
        self._progress_file.show(shown)
        for note in self._learning.look(step, values):
            self._display.say(str(note))
        self._progress_file.note(self._learning.standing)

    def conclude(self) -> None:
        """Says once more, at the end of a training, what is normal about it, and whether it has learned."""
        warnings = [note for note in self._learning.standing if note.warns]
        for note in self._learning.standing:
            if not note.warns:
                self._display.say(str(note))
        if warnings:
            self._display.say("this training does not seem to have learned:")
        for note in warnings:
            self._display.say(f"  {note}")

    def say(self, text: str) -> None:
        """Prints a line on the terminal, above the bar."""
        self._display.say(text)

    def images(self, views: Sequence[Tensor], mean: Triple, std: Triple) -> None:
        """Draws the first VIEWS_SHOWN samples, in TensorBoard and in pictures/views.png.

        views: of each group (N, V, 3, H, W), normalised with mean and std; each has a strip of the picture.
        """
        picture = stacked([grid(to_bytes(group[:VIEWS_SHOWN].cpu(), mean, std)) for group in views])
        path = self.folder / "pictures" / "views.png"
        with refusing_os_errors(path):
            path.parent.mkdir(exist_ok=True)
            write_whole(path, [png(picture)])
        with refusing_os_errors(self._events):
            self._tensorboard.add_image("views", picture, 0)

    def picture(self, step: int, path: Path) -> None:
        """Shows a PNG file of the run in TensorBoard, under the file's name."""
        with Image.open(path) as image, refusing_os_errors(self._events):
            self._tensorboard.add_image(path.stem, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def embedding(self, step: int, sample: ImageSample, classes: Sequence[str]) -> None:
        """Writes the features for TensorBoard's projector, which draws each point as its image."""
        side = sample.image.shape[-1]
        rows = min(len(sample), (8192 // side) ** 2)  # the projector's sprite is at most 8192 pixels wide
        names = [printable(without_wnid(name)).strip() or "''" for name in classes]
        with refusing_os_errors(self._events):
            self._tensorboard.add_embedding(
                sample.x[:rows],
                # One line each: the projector drops an empty one, and then names the points after it wrongly.
                metadata=[names[int(label)] for label in sample.label[:rows]],
                label_img=sample.image[:rows].float() / 255,
                global_step=step,
                tag="encoder",
            )

    def close(self) -> None:
        self._display.close()
        with refusing_os_errors(self._metrics):
            self._lines.close()
        with refusing_os_errors(self._events):
            self._tensorboard.close()
