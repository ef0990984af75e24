"""The outcome of a run from its events: the first worker to fail is found, in whatever order the events came."""

import signal

import pytest

from kilobatch.launch.processes.events import (
    AgentJoined,
    AgentLost,
    AllJoined,
    Event,
    HungWorker,
    NodeDone,
    RunEnded,
    Stalled,
    StoppedEarly,
    StopRequested,
    WorkerFailed,
    from_line,
    run_outcome,
    to_line,
)
from kilobatch.launch.processes.exit_status import REFUSED, RunOutcome

PEER = WorkerFailed(
    0, "n0", 1, ["RuntimeError: [pair.cc:545] Read error [10.0.0.2]:1: Connection reset by peer. GLHF!"]
)
ABORTED = WorkerFailed(
    1, "n0", -signal.SIGABRT, ["what():  NCCL error: remote process exited or there was a network error"]
)
RAISED = WorkerFailed(2, "n1", 1, ["ValueError: a bug"])
KILLED = WorkerFailed(3, "n1", -signal.SIGKILL, ["step 7"])
REFUSING = WorkerFailed(4, "n2", REFUSED, ["step 7", "kilobatch: no room:", "  left"])
LOST = AgentLost(1, "n1", "its agent has ended")
STOP = StopRequested(1, "SIGTERM on n0")


@pytest.mark.parametrize(
    ("events", "kind", "rank"),
    [
        ([PEER, ABORTED, RAISED], "failed", 2),
        ([PEER, ABORTED, RAISED, KILLED], "failed", 3),
        ([PEER, ABORTED, RAISED, KILLED, REFUSING], "refused", 4),
        ([REFUSING, WorkerFailed(0, "n0", REFUSED, ["kilobatch: no room:", "  left"])], "refused", 0),
        ([RAISED, WorkerFailed(0, "n0", 1, ["ValueError: another"])], "failed", 2),
        ([ABORTED, PEER], "failed", 1),
        ([PEER, LOST], "lost", None),
        ([RAISED, LOST], "failed", 2),
        ([STOP, StoppedEarly(0), PEER], "interrupted", None),
        ([STOP, StoppedEarly(0), RAISED], "failed", 2),
        ([STOP, LOST, NodeDone(0, True, [])], "lost", None),
        ([WorkerFailed(0, "n0", -signal.SIGUSR2, []), STOP], "interrupted", None),
        ([WorkerFailed(0, "n0", -signal.SIGTERM, [])], "failed", 0),
        ([STOP, NodeDone(0, False, []), NodeDone(1, True, [])], "interrupted", None),
        ([STOP, NodeDone(0, False, []), NodeDone(1, False, [])], "finished", None),
        ([Stalled("n0", 30), RAISED], "failed", 2),
    ],
)
def test_the_first_to_fail(events: list[Event], kind: str, rank: int | None):
    found = run_outcome(events)
    assert (found.kind, found.rank) == (kind, rank)


def test_a_refusal_keeps_its_whole_message():
    assert run_outcome([REFUSING]).lines == ["kilobatch: no room:", "  left"]


def test_a_stall_names_the_workers_for_which_the_others_wait():
    stalled, first = Stalled("n0", 30), NodeDone(0, False, [HungWorker(0, "n0", 9, True, ["waits"])])

    def with_other(pace: int, answered: bool) -> RunOutcome:
        return run_outcome([stalled, first, NodeDone(1, False, [HungWorker(1, "n1", pace, answered, ["sleeps"])])])

    how = "no sign of life for 30 minutes; "
    assert with_other(8, True) == RunOutcome("stalled", 1, "n1", how + "rank 1: the least far", ["sleeps"])
    unresponsive = how + "rank 1: stopped, or stuck in the kernel: no stacks written"
    assert with_other(10, False) == RunOutcome("stalled", 1, "n1", unresponsive, ["sleeps"])
    assert with_other(9, True).rank is None


def test_events_survive_being_sent():
    hung = [HungWorker(1, "n1", 8, True, ["ü\n"])]
    for event in (AgentJoined(1, "n1"), AllJoined("10.0.0.1"), STOP, RAISED, LOST, StoppedEarly(1), Stalled("n0", 0.5)):
        assert from_line(to_line(event)) == event
    for event in (NodeDone(1, True, hung), RunEnded(RunOutcome("failed", 1, "n1", "exit code 1", ["a", "b"]))):
        line = to_line(event)
        assert from_line(line) == event
        assert line.count(b"\n") == 1
