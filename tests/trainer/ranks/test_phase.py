"""Lines about work that goes on: none of short work, one now and then of long work."""

import time
from collections.abc import Iterator

import pytest

from kilobatch.trainer.ranks import phase


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is said. A second passes with each call of phase()."""
    clock = iter(range(10_000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    lines: list[str] = []
    phase.show_with(lines.append)
    yield lines
    phase.show_with(None)


def test_short_work_is_not_mentioned(said: list[str]):
    for work in ("features", "linear", "features"):
        for done in range(2):
            phase.phase(work, done, 10)
    assert said == []


def test_long_work_is_told_now_and_then_with_the_time_to_go(said: list[str]):
    phase.announce("evaluating: linear")
    for done in range(0, 9000, 300):
        phase.phase("linear: epochs", done, 9000)
    assert said == [
        "evaluating: linear",
        "linear: epochs: 600 of 9,000, 0:00:28 to go",
        "linear: epochs: 3,600 of 9,000, 0:00:18 to go",
        "linear: epochs: 6,600 of 9,000, 0:00:08 to go",
    ]


def test_one_who_waits_may_be_told_more_often(said: list[str]):
    other: list[str] = []
    with phase.shown_with(other.append, every=3.0):
        for done in range(10):
            phase.phase("rows", done, 10)
    phase.announce("heard by nobody")
    assert [line.split(",")[0] for line in other] == ["rows: 2 of 10", "rows: 5 of 10", "rows: 8 of 10"] and said == []


def test_the_same_work_anew_is_another(said: list[str]):
    for _ in range(3):
        for done in range(1, 3):
            phase.phase("features", done, 10)
    assert said == []


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]):
    phase.announce("evaluating")
    phase.phase("features", 1, 2)
    assert capsys.readouterr() == ("", "")
