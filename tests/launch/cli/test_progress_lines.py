"""Tables that are printed again and again while one waits for a training."""

import time
from collections.abc import Callable

import pytest

from kilobatch.launch.runs import run_folder
from kilobatch.launch.runs.run_folder import RunOptions
from tests.launch.conftest import CommandResult


def make(name: str) -> None:
    run = run_folder.create_run(RunOptions(name=name), "demo", "run: {}\n", 1)
    run_folder.set_status(run, "finished", 1)


def test_status_is_watched_without_a_terminal(
    kilobatch: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise KeyboardInterrupt
        make("begun")

    monkeypatch.setattr(time, "sleep", sleep)
    make("demo")
    result = kilobatch("status", "--watch")
    assert (result.code, result.err, pauses) == (0, "", [10.0, 10.0])
    first, second = result.out.split(time.strftime("%Y-"))[1:]  # each table stands below its time
    assert "demo" in first and "begun" not in first
    assert "demo" in second and "begun" in second
