"""The outcome of a run from its events: the first worker to fail is found, in whatever order the events came."""

import signal
import time
from dataclasses import replace

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
from kilobatch.launch.processes.supervisor import LocalEventLog, Supervisor
from tests.helpers.watchdog_lines import REMOTE_ERROR, watchdog

PEER = WorkerFailed(
    0, "n0", 1, ["RuntimeError: [pair.cc:545] Read error [10.0.0.2]:1: Connection reset by peer. GLHF!"]
)
ABORTED = WorkerFailed(
    1, "n0", -signal.SIGABRT, ["what():  NCCL error: remote process exited or there was a network error"]
)
RAISED = WorkerFailed(2, "n1", 1, ["ValueError: a bug"])
KILLED = WorkerFailed(3, "n1", -signal.SIGKILL, ["step 7"])
REFUSING = WorkerFailed(4, "n2", REFUSED, ["step 7", "kilobatch: no room:", "  left"])
TIMED_OUT = WorkerFailed(5, "n2", -signal.SIGABRT, ["step 7", *watchdog(5)])
BEHIND = WorkerFailed(6, "n3", -signal.SIGABRT, ["step 7", *watchdog(6, enqueued=808)])
REMOTE = WorkerFailed(7, "n3", 1, REMOTE_ERROR)
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
        ([Stalled("n0", 30), TIMED_OUT], "stalled", None),
        ([TIMED_OUT, REMOTE, KILLED], "failed", 3),
        ([TIMED_OUT, REMOTE, RAISED], "failed", 2),
        ([TIMED_OUT, REMOTE, LOST], "lost", None),
        ([REMOTE, TIMED_OUT], "stalled", None),
        ([TIMED_OUT, BEHIND], "stalled", 6),
        ([STOP, StoppedEarly(0), TIMED_OUT], "interrupted", None),
        ([RAISED, WorkerFailed(8, "n3", 1, ["ValueError: before"], raised=5.0)], "failed", 2),
        ([replace(RAISED, raised=6.0), WorkerFailed(8, "n3", 1, ["ValueError: before"], raised=5.0)], "failed", 8),
        ([replace(RAISED, raised=6.0), replace(PEER, raised=5.0)], "failed", 2),
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
    assert with_other(9, True).rank is None


def test_a_stall_tells_what_the_kernel_says_of_workers_that_do_not_answer():
    def outcome(*states: str) -> RunOutcome:
        hung = [HungWorker(rank, f"n{rank}", 9, not state, ["here"], state) for rank, state in enumerate(states)]
        return run_outcome([Stalled("n0", 30), NodeDone(0, False, hung)])

    how, stopped, stuck = "no sign of life for 30 minutes; ", "stopped (state T)", "stuck in the kernel (state D)"
    one = RunOutcome("stalled", 1, "n1", f"{how}rank 1: {stuck}, no stacks written", ["here"])
    assert outcome("", stuck, "") == one
    assert outcome("", stuck, stopped, stuck).how == (
        f"{how}ranks 1, 3: {stuck}, no stacks written; rank 2: {stopped}, no stacks written"
    )
    assert outcome("", stuck, stopped, stuck).rank == 1
    all_stuck = RunOutcome("stalled", None, "n0", f"{how}ranks 0, 1: {stuck}, no stacks written", ["here"])
    assert outcome(stuck, stuck) == all_stuck


def test_a_timeout_names_the_collective_and_shows_no_stacks():
    outcome = run_outcome([TIMED_OUT, BEHIND])
    assert outcome.how.startswith("a collective (ALLREDUCE, number 808) timed out after 10 minutes; rank 6: the least")
    assert outcome.host == "n3"
    assert outcome.lines and not any(line.startswith("frame #") for line in outcome.lines)


def test_events_survive_being_sent():
    hung = [HungWorker(1, "n1", 8, False, ["ü\n"], "stopped (state T)")]
    for event in (
        AgentJoined(1, "n1"),
        AllJoined("10.0.0.1"),
        STOP,
        replace(RAISED, raised=5.25),
        LOST,
        StoppedEarly(1),
        Stalled("n0", 0.5),
    ):
        assert from_line(to_line(event)) == event
    for event in (NodeDone(1, True, hung), RunEnded(RunOutcome("failed", 1, "n1", "exit code 1", ["a", "b"]))):
        line = to_line(event)
        assert from_line(line) == event
        assert line.count(b"\n") == 1


@pytest.mark.parametrize("ahead", [-3600.0, 0.0, 3600.0])
def test_the_clocks_of_nodes_may_differ(ahead: float):
    """Rank 2, on a node whose clock is ahead, failed a second before rank 8, and waited for its checkpoint."""
    now = time.time()
    late, early = WorkerFailed(8, "n3", 1, ["ValueError: b"], now - 1), WorkerFailed(2, "n1", 1, ["ValueError: a"], 0.0)
    early = replace(early, raised=now - 2 + ahead, posted=now + ahead)
    log = LocalEventLog()
    for event in (late, early):
        log.post(event)
    outcome = Supervisor(log, 0, lambda: None, None, 0.0).conclude(False, [])
    assert (outcome.kind, outcome.rank) == ("failed", 2)
