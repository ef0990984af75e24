"""Shows the progress of a training: as a bar on a terminal, elsewhere as a plain line every few seconds."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

EVERY = 10.0  # seconds between plain lines


class Eta:
    """An estimate of the time that is left, from the speed since now; `step` steps are done already."""

    def __init__(self, step: int, total_steps: int):
        self._first, self._total, self._started = step, total_steps, time.perf_counter()

    def seconds_left(self, step: int) -> float:
        return (time.perf_counter() - self._started) / (step - self._first) * (self._total - step)


class Bar:
    """A progress bar by rich: loss, images/s, share of the time spent waiting for data, time to go."""

    def __init__(self, console: Console, total_steps: int, start_step: int):
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=start_step)
        self._bar.start()

    def move(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def show(self, values: Mapping[str, float]) -> None:
        if "train/loss" in values:
            self._bar.update(self._task, description=describe_metrics(values))

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


class Lines:
    """The same values as lines of text, every EVERY seconds and at the last step."""

    def __init__(self, console: Console, total_steps: int, start_step: int):
        self._console, self._total, self._eta = console, total_steps, Eta(start_step, total_steps)
        self._printed = time.perf_counter()
        self._metrics = ""

    def move(self, step: int) -> None:
        now = time.perf_counter()
        if now - self._printed < EVERY and step < self._total:
            return
        self._printed = now
        self.say(f"step {step}/{self._total}  {self._metrics}  {clock(self._eta.seconds_left(step))} to go")

    def show(self, values: Mapping[str, float]) -> None:
        if "train/loss" in values:
            self._metrics = describe_metrics(values)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        pass


def describe_metrics(values: Mapping[str, float]) -> str:
    """The logged values that are shown next to the bar."""
    parts = [f"loss {values['train/loss']:.4f}"]
    if "train/images_per_second" in values:
        parts.append(f"{values['train/images_per_second']:,.0f} images/s")
        parts.append(f"data wait {values['train/data_wait']:.0%}")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
