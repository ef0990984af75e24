"""Shows the progress of a training: as a bar on a terminal, elsewhere as a plain line every few seconds."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn

from kilobatch.trainer.ranks.phase import clock

EVERY = 10.0  # seconds between plain lines
EVALUATED = {
    "knn/top1": "k-NN top-1",
    "linear/top1": "linear top-1",
    "fast_linear/top1": "fast linear top-1",
    "classify/top1": "top-1 of its classifier",
    "classify_moved/top1": "top-1 of its classifier on moved images",
    "moved/moved/trained": "k-NN top-1 of moved images",
}


class Eta:
    """An estimate of the time that is left. It begins at the end of the first step, which also compiles and allocates;
    evaluations after epochs count."""

    def __init__(self, total_steps: int):
        self._total = total_steps
        self._first: tuple[int, float] | None = None  # the first step, and when it had ended

    def seconds_left(self, step: int) -> float | None:
        """After the end of this step; None after the first one, of which no speed follows. To be asked at each."""
        now = time.perf_counter()
        if self._first is None:
            self._first = step, now
        first, since = self._first
        if step == self._total:
            return 0.0
        return (now - since) / (step - first) * (self._total - step) if step > first else None


class Bar:
    """A progress bar by rich: loss, images/s, share of the time spent waiting for data, time to go."""

    def __init__(self, console: Console, total_steps: int, start_step: int):
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TextColumn("{task.fields[to_go]}"),
            console=console,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=start_step, to_go="")
        self._bar.start()

    def move(self, step: int, seconds_left: float | None) -> None:
        to_go = "" if seconds_left is None else clock(seconds_left)
        self._bar.update(self._task, completed=step, to_go=to_go)

    def show(self, values: Mapping[str, float]) -> None:
        if "train/loss" in values:
            self._bar.update(self._task, description=describe_metrics(values))
        elif evaluated := describe_evaluation(values):
            self.say(evaluated)

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


class Lines:
    """The same values as lines of text, every EVERY seconds and at the last step."""

    def __init__(self, console: Console, total_steps: int):
        self._console, self._total = console, total_steps
        self._printed = time.perf_counter()
        self._metrics = ""

    def move(self, step: int, seconds_left: float | None) -> None:
        now = time.perf_counter()
        if now - self._printed < EVERY and step < self._total:
            return
        self._printed = now
        to_go = "" if seconds_left is None else f"{clock(seconds_left)} to go"
        self.say("  ".join(filter(None, (f"step {step}/{self._total}", self._metrics, to_go))))

    def show(self, values: Mapping[str, float]) -> None:
        if "train/loss" in values:
            self._metrics = describe_metrics(values)
        elif evaluated := describe_evaluation(values):
            self.say(evaluated)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        pass


def describe_metrics(values: Mapping[str, float]) -> str:
    """The logged values that are shown next to the bar."""
    parts = [f"loss {in_digits(values['train/loss'])}"]
    if "train/images_per_second" in values:
        parts.append(f"{values['train/images_per_second']:,.0f} images/s")
        parts.append(f"data wait {values['train/data_wait']:.0%}")
    return "  ".join(parts)


def in_digits(loss: float) -> str:
    """A loss with four digits behind the point, or one that has grown beyond reading as 3.1234e+09."""
    return f"{loss:.4f}" if abs(loss) < 1e5 else f"{loss:.4e}"


def describe_evaluation(values: Mapping[str, float]) -> str:
    """An evaluation after an epoch as a line; "" for other values."""
    parts = [f"{EVALUATED[name]} {value:.1%}" for name, value in values.items() if name in EVALUATED]
    return f"epoch {values['epoch']:.0f}: {', '.join(parts)}" if "epoch" in values and parts else ""
