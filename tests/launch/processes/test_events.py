"""What the news of a run come to: who was the first to fail, whatever was heard first."""

import signal

import pytest

from kilobatch.launch.processes.events import (
    Came,
    Done,
    Failed,
    Left,
    Lost,
    News,
    Over,
    Reached,
    Stalled,
    Stop,
    Together,
    ending,
    from_line,
    to_line,
)
from kilobatch.launch.processes.exit_status import REFUSED, Ending

PEER = Failed(0, "n0", 1, ["RuntimeError: [pair.cc:545] Read error [10.0.0.2]:1: Connection reset by peer. GLHF!"])
ABORTED = Failed(1, "n0", -signal.SIGABRT, ["what():  NCCL error: remote process exited or there was a network error"])
RAISED = Failed(2, "n1", 1, ["ValueError: a bug"])
KILLED = Failed(3, "n1", -signal.SIGKILL, ["step 7"])
REFUSING = Failed(4, "n2", REFUSED, ["step 7", "kilobatch: no room:", "  left"])
LOST = Lost(1, "n1", "its agent has ended")
STOP = Stop(1, "SIGTERM on n0")


@pytest.mark.parametrize(
    ("news", "kind", "rank"),
    [
        ([PEER, ABORTED, RAISED], "failed", 2),
        ([PEER, ABORTED, RAISED, KILLED], "failed", 3),
        ([PEER, ABORTED, RAISED, KILLED, REFUSING], "refused", 4),
        ([REFUSING, Failed(0, "n0", REFUSED, ["kilobatch: no room:", "  left"])], "refused", 0),
        ([RAISED, Failed(0, "n0", 1, ["ValueError: another"])], "failed", 2),
        ([ABORTED, PEER], "failed", 1),
        ([PEER, LOST], "lost", None),
        ([RAISED, LOST], "failed", 2),
        ([STOP, Left(0), PEER], "interrupted", None),
        ([STOP, Left(0), RAISED], "failed", 2),
        ([STOP, LOST, Done(0, True, [])], "lost", None),
        ([Failed(0, "n0", -signal.SIGUSR2, []), STOP], "interrupted", None),
        ([Failed(0, "n0", -signal.SIGTERM, [])], "failed", 0),
        ([STOP, Done(0, False, []), Done(1, True, [])], "interrupted", None),
        ([STOP, Done(0, False, []), Done(1, False, [])], "finished", None),
        ([Stalled("n0", 30), RAISED], "failed", 2),
    ],
)
def test_the_first_to_fail(news: list[News], kind: str, rank: int | None):
    found = ending(news)
    assert (found.kind, found.rank) == (kind, rank)


def test_a_refusal_is_its_whole_message():
    assert ending([REFUSING]).lines == ["kilobatch: no room:", "  left"]


def test_a_hang_names_those_for_which_the_others_wait():
    stalled, first = Stalled("n0", 30), Done(0, False, [Reached(0, "n0", 9, True, ["waits"])])

    def with_other(pace: int, answered: bool) -> Ending:
        return ending([stalled, first, Done(1, False, [Reached(1, "n1", pace, answered, ["sleeps"])])])

    how = "no sign of life for 30 minutes; "
    assert with_other(8, True) == Ending("stalled", 1, "n1", how + "rank 1: the least far", ["sleeps"])
    deaf = how + "rank 1: stopped, or stuck in the kernel: no stacks written"
    assert with_other(10, False) == Ending("stalled", 1, "n1", deaf, ["sleeps"])
    assert with_other(9, True).rank is None


def test_news_travel_as_they_are():
    hung = [Reached(1, "n1", 8, True, ["ü\n"])]
    for news in (Came(1, "n1"), Together("10.0.0.1"), STOP, RAISED, LOST, Left(1), Stalled("n0", 0.5)):
        assert from_line(to_line(news)) == news
    for news in (Done(1, True, hung), Over(Ending("failed", 1, "n1", "exit code 1", ["a", "b"]))):
        line = to_line(news)
        assert from_line(line) == news
        assert line.count(b"\n") == 1
