"""What a run shows of itself: metrics.jsonl, progress.json, TensorBoard, pictures, lines on the terminal. By rank 0."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from torch import Tensor

from kilobatch.data.files import write_whole
from kilobatch.trainer.evaluate.gallery import Gallery
from kilobatch.trainer.evaluate.images import Triple, grid, png, to_bytes
from kilobatch.trainer.monitor.progress_bar import Bar, Lines
from kilobatch.trainer.monitor.progress_file import Stand

TIMINGS = ("train/seconds", "train/images_per_second", "train/data_wait")  # differ between equal runs; the rest do not
SHOWN = 16  # samples in the grid of views


class Monitor:
    """Writes into the run's folder; resumed, it goes on where step start_step left the logs.

    What a killed run logged after its last checkpoint is cut off, so that metrics.jsonl ends up as the uninterrupted
    run's. TensorBoard hides such steps likewise.
    """

    def __init__(self, folder: Path, total_steps: int, start_step: int, epochs: int, console: Console | None = None):
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        console = console or Console(soft_wrap=True)
        self.folder, self.total_steps = folder, total_steps
        forget(folder / "metrics.jsonl", start_step)
        self._lines = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else None, flush_secs=10
        )
        self._progress = (Bar if console.is_terminal else Lines)(console, total_steps, start_step)
        self._stand = Stand(folder, total_steps, start_step, epochs)
        self._since, self._images, self._waited = time.perf_counter(), 0, 0.0
        self._warned = False

    def progress(self, step: int, images: int, waited: float) -> None:
        """After each step: images of all ranks in it, and the seconds it waited for its batch."""
        self._images += images
        self._waited += waited
        self._progress.move(step)
        self._stand.move(step)

    def rates(self) -> dict[str, float]:
        """TIMINGS since the last call: seconds, images per second of all ranks, share of the time spent waiting."""
        now = time.perf_counter()
        seconds = now - self._since
        values = (seconds, self._images / seconds, self._waited / seconds)
        self._since, self._images, self._waited = now, 0, 0.0
        return dict(zip(TIMINGS, values, strict=True))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, flushed, and TensorBoard's scalars of the same names, where they are `group/name`:
        an evaluation's epoch would be a group of its own. Floats are exact (repr)."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        grouped = {name: value for name, value in values.items() if "/" in name}
        # One event for all: add_scalar makes one of each, 160 of them where LARS tells its trust ratios.
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in grouped.items()])
        assert self._board.file_writer is not None, "it is there until close()"
        self._board.file_writer.add_summary(summary, step)
        self._progress.show(values)
        self._stand.show(values)

    def warn_once(self, warning: str) -> None:
        """Prints the first warning it is given, and no other."""
        if not self._warned:
            self._progress.say(f"warning: {warning}")
        self._warned = True

    def say(self, text: str) -> None:
        """A line on the terminal, above the bar."""
        self._progress.say(text)

    def images(self, views: Tensor, mean: Triple, std: Triple) -> None:
        """views (N, V, 3, H, W), normalised: the first SHOWN samples, in TensorBoard and in pictures/views.png."""
        picture = grid(to_bytes(views[:SHOWN].cpu(), mean, std))
        (self.folder / "pictures").mkdir(exist_ok=True)
        write_whole(self.folder / "pictures" / "views.png", [png(picture)])
        self._board.add_image("views", picture, 0)

    def picture(self, step: int, path: Path) -> None:
        """A PNG of the run, shown by its file's name in TensorBoard too."""
        with Image.open(path) as image:
            self._board.add_image(path.stem, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def embedding(self, step: int, gallery: Gallery, classes: Sequence[str]) -> None:
        """TensorBoard's projector, each point drawn as its image."""
        side = gallery.image.shape[-1]
        rows = min(len(gallery), (8192 // side) ** 2)  # its sprite is at most 8192 pixels wide
        self._board.add_embedding(
            gallery.x[:rows],
            metadata=[classes[label] for label in gallery.label[:rows].tolist()],
            label_img=gallery.image[:rows].float() / 255,
            global_step=step,
            tag="encoder",
        )

    def close(self) -> None:
        self._progress.close()
        self._lines.close()
        self._board.close()


def forget(metrics: Path, start_step: int) -> None:
    """Cuts metrics.jsonl off before its first line that a run going on after start_step writes again.

    That is any line of a later step, an evaluation of start_step itself (the loop repeats the one that was due), and a
    line that a kill left half-written.
    """
    if not metrics.exists():
        return
    kept = 0
    with metrics.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            values = json.loads(line)
            if (values["step"], "train/loss" not in values) > (start_step, False):
                break
            kept += len(line)
        file.truncate(kept)
