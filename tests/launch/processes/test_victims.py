"""Workers that failed because of another one, by lines as gloo, NCCL's watchdog and the store have written them."""

import pytest

from kilobatch.launch.processes.victims import (
    Timeout,
    Victim,
    describe_timeouts,
    error_lines,
    timeout_of,
    victim_of,
)
from tests.helpers.watchdog_lines import (
    ABORTED_COMMUNICATOR,
    CUDA_ERROR,
    DUMP_SIGNAL,
    FRAMES,
    GLOO_RESET,
    GLOO_TIMEOUT,
    HEARTBEAT_MONITOR,
    REMOTE_ERROR,
    STORE_CLOSED,
    STORE_TIMEOUT,
    TRACEBACK,
    watchdog,
)


@pytest.mark.parametrize(
    ("lines", "victim"),
    [
        (watchdog(1), "timed out"),
        (watchdog(1, torch="2.4"), "timed out"),
        (watchdog(1, torch="1.13"), "timed out"),
        (HEARTBEAT_MONITOR, "timed out"),
        (DUMP_SIGNAL, "timed out"),
        (ABORTED_COMMUNICATOR, "timed out"),
        (GLOO_TIMEOUT, "timed out"),
        (STORE_TIMEOUT, "timed out"),
        (GLOO_RESET, "lost a peer"),
        (STORE_CLOSED, "lost a peer"),
        (REMOTE_ERROR, "lost a peer"),
        ([f"[rank1]: {line}" for line in REMOTE_ERROR], "lost a peer"),
        ([*TRACEBACK, "ValueError: a bug", ""], None),
        (CUDA_ERROR, None),
        (["step 7", "step 8"], None),
        ([], None),
    ],
)
def test_how_another_worker_brought_this_one_down(lines: list[str], victim: Victim | None):
    assert victim_of(["step 7", *lines]) == victim


def test_stacks_of_any_length_hide_nothing():
    assert victim_of([*watchdog(1), *(2 * FRAMES), *FRAMES]) == "timed out"
    assert victim_of([*watchdog(1), "Thread 0x00007f1 (most recent call first):", *(50 * ['  File "a.py", line 1'])])


def test_what_a_worker_writes_after_its_own_error_does_not_hide_that():
    own = [*TRACEBACK, "ValueError: a bug", ""]
    assert victim_of([*own, *watchdog(1)]) is None
    assert victim_of([*own, "terminate called without an active exception", "NCCL communicator was aborted"]) is None
    assert victim_of([*CUDA_ERROR, "RuntimeError: NCCL communicator was aborted on rank 1."]) is None


def test_lines_before_the_error_do_not_excuse_it():
    retried = "[W socket.cpp:697] [c10d] The client socket has failed to connect to n0: Connection refused"
    assert victim_of([retried, *TRACEBACK, "ValueError: a bug"]) is None


@pytest.mark.parametrize(
    "link",
    [
        "During handling of the above exception, another exception occurred:",
        "The above exception was the direct cause of the following exception:",
    ],
)
def test_of_errors_in_a_chain_the_first_counts(link: str):
    own, lost = [*TRACEBACK, "ValueError: a bug", ""], [*GLOO_RESET, ""]
    assert victim_of([*own, link, "", *lost]) is None
    assert victim_of([*lost, link, "", *own]) == "lost a peer"
    assert victim_of([*lost, "step 8", *own]) is None, "an earlier one that was handled"


def test_the_lines_that_say_what_went_wrong():
    assert error_lines([*TRACEBACK, "ValueError: a", "  bug", "", "[W socket.cpp] a warning"]) == [
        "ValueError: a",
        "  bug",
    ]
    assert error_lines(["step 7", *FRAMES[:-1]]) == ["step 7"]


@pytest.mark.parametrize("torch", ["2.9", "2.4"])
def test_the_numbers_that_the_watchdog_tells(torch: str):
    assert timeout_of(watchdog(3, enqueued=811, torch=torch)) == Timeout("ALLREDUCE", 808, 600.0, 0, 811, 807)
    assert timeout_of(watchdog(3, torch="1.13")) == Timeout("ALLREDUCE", 808, 600.0, None, None, None)
    assert timeout_of(GLOO_TIMEOUT) == Timeout(None, None, 1800.0, None, None, None)
    assert timeout_of(DUMP_SIGNAL) == Timeout(None, None, None, 0, 807, 807)


def test_the_rank_that_has_begun_the_fewest_is_the_one_that_is_waited_for():
    timeouts = {rank: timeout_of(watchdog(rank, enqueued=811)) for rank in range(3)}
    assert describe_timeouts(timeouts) == (
        "a collective (ALLREDUCE, number 808) timed out after 10 minutes; ranks 0, 1, 2 waited in it",
        None,
    )
    assert describe_timeouts(timeouts | {3: timeout_of(DUMP_SIGNAL)}) == (
        "a collective (ALLREDUCE, number 808) timed out after 10 minutes; rank 3: the least far, with 807 begun and "
        "807 done, elsewhere 811 and 807",
        3,
    )
    another_group = timeout_of(watchdog(3, enqueued=2, group=1))
    assert describe_timeouts(timeouts | {3: another_group})[1] is None, "each group counts by itself"
    assert describe_timeouts({0: timeout_of(GLOO_TIMEOUT)}) == (
        "a collective timed out after 30 minutes; rank 0 waited in it",
        None,
    )
