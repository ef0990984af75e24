"""How far the training is: a bar on a terminal, elsewhere a plain line now and then."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

EVERY = 10.0  # seconds between plain lines


class Pace:
    """The time that the steps to come will take, from those since now, the first of them being after `step`."""

    def __init__(self, step: int, total_steps: int):
        self._first, self._total, self._began = step, total_steps, time.perf_counter()

    def seconds_left(self, step: int) -> float:
        return (time.perf_counter() - self._began) / (step - self._first) * (self._total - step)


class Bar:
    """Drawn by rich: loss, images/s, share of the time spent waiting for data, time to go."""

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
            self._bar.update(self._task, description=in_words(values))

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


class Lines:
    """The same as text, every EVERY seconds and at the last step."""

    def __init__(self, console: Console, total_steps: int, start_step: int):
        self._console, self._total, self._pace = console, total_steps, Pace(start_step, total_steps)
        self._printed = time.perf_counter()
        self._words = ""

    def move(self, step: int) -> None:
        now = time.perf_counter()
        if now - self._printed < EVERY and step < self._total:
            return
        self._printed = now
        self.say(f"step {step}/{self._total}  {self._words}  {clock(self._pace.seconds_left(step))} to go")

    def show(self, values: Mapping[str, float]) -> None:
        if "train/loss" in values:
            self._words = in_words(values)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        pass


def in_words(values: Mapping[str, float]) -> str:
    """What of the logged values stands beside the bar."""
    words = [f"loss {values['train/loss']:.4f}"]
    if "train/images_per_second" in values:
        words.append(f"{values['train/images_per_second']:,.0f} images/s")
        words.append(f"data wait {values['train/data_wait']:.0%}")
    return "  ".join(words)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
