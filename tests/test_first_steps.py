"""docs/first-steps.md: its commands and scripts run, in order, on small photographs, and print what it says."""

import contextlib
import inspect
import io
import os
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from kilobatch.launch.__main__ import main
from kilobatch.launch.planning import own_rate
from kilobatch.launch.processes import launcher
from kilobatch.trainer.evaluate.baselines import measurement
from kilobatch.trainer.monitor import progress_bar
from tests.helpers import worker_in_process

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "first-steps.md").read_text("utf-8")
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CLASSES = ("church", "parachute", "tench")
SETUP = ("make", "source", "cd")  # commands that make what a test has already
LEFT_OUT = "…"
INTERRUPT = "^C"
# What the test adds to a command: fewer steps, on one thread, without the process that asks about the memory.
MORE = {
    "train": ["schedule.epochs=2", "run.log_every=1", "data.threads=1", "run.device=cpu", "--workers", "1", "--anyway"]
}
# Printed by the launcher's own signal handler, in place of which the test's worker is signalled itself.
OF_LAUNCHER = "kilobatch: stopping: the workers save and leave; once more to kill them"


class Step(NamedTuple):
    """A command of the page, and the lines that the page shows below it."""

    command: str
    shown: list[str]


def steps(text: str) -> Iterator[Step]:
    """The commands of the page; a script is what a python block writes, whose first line names it."""
    for kind, block in BLOCK.findall(text):
        if kind == "python":
            yield Step(f"write {block.splitlines()[0].removeprefix('# ')}", block.splitlines())
            continue
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *shown = part.replace("\\\n", " ").splitlines()
            yield Step(" ".join(command.split()), shown)


STEPS = list(steps(TEXT))
COMMANDS = [step for step in STEPS if step.command.split()[0] not in ("write", *SETUP)]


def words(line: str) -> list[str]:
    """A printed line without what differs from run to run: numbers and ranges of them, times, and paths."""
    line = re.sub(r"\S*/\S*", " ", line)
    line = re.sub(r"\bless than a second\b", "about 1", re.sub(r"([\d.,]+) to [\d.,]+", r"\1", line))
    line = re.sub(r"\b(milliseconds|seconds|minutes|hours|\d+[smhd])\b", " ", line)
    return re.findall(r"[^\W\d_]+", line)


def not_printed(shown: list[str], printed: str) -> list[str]:
    """The lines of the page that were not printed, or not in this order. Lines may be broken at other places."""
    said, missing, at = words(printed), [], 0
    for line in shown:
        wanted = words(line)
        if not wanted or line.strip() in (LEFT_OUT, INTERRUPT):
            continue
        places = range(at, len(said) - len(wanted) + 1)
        found = next((place for place in places if said[place : place + len(wanted)] == wanted), None)
        if found is None:
            missing.append(line)
        else:
            at = found + len(wanted)
    return missing


def photographs(folder: Path) -> None:
    """48 training and 12 test photographs of three classes: a colour each, with noise."""
    draws = np.random.default_rng(0)
    for split, each in (("train", 16), ("val", 4)):
        for number, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(each):
                pixels = draws.integers(0, 160, (100, 110, 3), np.uint8)
                pixels[..., number] += 80
                Image.fromarray(pixels).save(folder / split / name / f"{i}.jpg", quality=90)


def printed_by(step: Step) -> str:
    """Does a step of the page in the working folder. Returns what it prints."""
    program, *arguments = shlex.split(step.command)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        match program:
            case "write":
                Path(arguments[0]).write_text("\n".join(step.shown))
            case "python":
                exec(compile(Path(arguments[0]).read_text(), arguments[0], "exec"), {})
            case "kilobatch":
                ended = 130 if INTERRUPT in step.shown else 0
                assert exit_code(arguments, interrupted=ended > 0) == ended, printed.getvalue()
            case _:
                assert program in SETUP and not step.shown, step.command
    return printed.getvalue()


def exit_code(arguments: list[str], *, interrupted: bool) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        if interrupted:
            patch.setattr(progress_bar.Lines, "move", signalling(progress_bar.Lines.move, step=2))
        main([*arguments, *MORE.get(arguments[0], [])])
    return int(end.value.code or 0)


def signalling(move: Callable[..., None], step: int) -> Callable[..., None]:
    """The same, but Ctrl-C is pressed after this step."""

    def moved(self: progress_bar.Lines, done: int, seconds_left: float | None) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)
        move(self, done, seconds_left)

    return moved


def test_the_road(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "run_workers", worker_in_process.run_workers)
    monkeypatch.setattr(own_rate, "SECONDS", 0.0)
    for name, images in (("TRAIN_IMAGES", 24), ("TEST_IMAGES", 9)):  # fewer than there are, as on the page
        monkeypatch.setattr(measurement, name, images)
    monkeypatch.setenv("KILOBATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "photos")
    for step in STEPS:
        printed = printed_by(step)
        if not step.command.startswith("write "):
            shown = [line for line in step.shown if line != OF_LAUNCHER]
            assert not not_printed(shown, printed), f"{step.command}\n{printed}"
    assert OF_LAUNCHER in inspect.getsource(launcher)
    assert Path("runs/first/pictures/neighbours.png").exists()


def test_its_numbers_of_commands() -> None:
    """What it says of itself."""
    stated = re.search(r"(\d+) commands", TEXT)
    assert stated and int(stated[1]) == len(COMMANDS), [step.command for step in COMMANDS]


def test_a_line_that_is_not_printed_is_found() -> None:
    printed = "step 3/9  loss 2.5\nwrote a.npz: 12 images\nk-NN top-1: 30.1%"
    assert not not_printed(["step 90/99  loss 1.23", LEFT_OUT, "k-NN top-1: 50.0%"], printed)
    assert not_printed(["wrote a.npz: 9 images", "step 1/9  loss 3"], printed) == ["step 1/9  loss 3"]
    assert not_printed(["k-NN top-5: 3%", "linear top-1: 3%"], printed) == ["linear top-1: 3%"]
