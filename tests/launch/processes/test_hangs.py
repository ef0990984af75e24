"""Workers that hang, are stopped or stuck in the kernel, or raise long before they end: each is named, and all end."""

import json
import pickle
import re
import time
from pathlib import Path

import pytest

from kilobatch.launch.processes import launcher, supervisor, worker_processes
from kilobatch.launch.processes.exit_status import RunOutcome
from tests.helpers.scripted_runs import alive, log_lines, until
from tests.helpers.stuck_files import stuck_folder


def test_a_rank_that_hangs_is_named_and_all_stacks_are_logged(folder: Path):
    outcome = launcher.run_workers(folder, 2, "scripted_worker", ["hangs", str(folder)], stall_minutes=3 / 60)
    assert (outcome.kind, outcome.rank) == ("stalled", 1)
    assert outcome.how == "no sign of life for 0.05 minutes; rank 1: the least far"
    assert "(most recent call first):" in outcome.lines[0]
    assert all("in hang" in line for line in outcome.lines[1:])
    assert any("in wait_for_others" in line for line in log_lines(folder, 0))
    assert alive(folder, 2) == []


def test_a_stopped_rank_is_named_as_such(folder: Path):
    outcome = launcher.run_workers(folder, 2, "scripted_worker", ["stops", str(folder)], stall_minutes=2 / 60)
    assert (outcome.kind, outcome.rank) == ("stalled", 1)
    assert outcome.how.endswith("rank 1: stopped (state T), no stacks written")
    assert alive(folder, 2) == []


def test_a_rank_in_the_kernel_is_named_with_the_place_where_it_waits(folder: Path):
    outcome = launcher.run_workers(folder, 2, "scripted_worker", ["forks", str(folder)], stall_minutes=2 / 60)
    assert (outcome.kind, outcome.rank) == ("stalled", 1)
    assert re.search(r"; rank 1: stuck in the kernel \(state D(, waits in \w+)?\), no stacks written$", outcome.how)
    assert outcome.lines[0].endswith(outcome.how.partition("rank 1: ")[2].partition(", no stacks")[0])
    assert log_lines(folder, 1)[1].startswith("kilobatch: no stacks of rank 1: stuck in the kernel (state D")
    assert alive(folder, 2) == []


def test_a_rank_that_the_kernel_does_not_let_go_does_not_keep_the_launcher(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(worker_processes, "KILL_SECONDS", 1.0)
    with stuck_folder(folder / "stuck"):
        began = time.monotonic()
        outcome = launcher.run_workers(folder, 2, "scripted_worker", ["reads", str(folder)], stall_minutes=2 / 60)
        assert time.monotonic() - began < 100
        assert (outcome.kind, outcome.rank) == ("stalled", 1)
        assert "rank 1: stuck in the kernel (state D" in outcome.how
        pid = (folder / "pid-1").read_text()
        warning = f"kilobatch: warning: rank 1 (process {pid}) has been killed, but has not ended: stuck in the kernel"
        assert warning in capfd.readouterr().err
        assert alive(folder, 2) == [1], "the test tries nothing"
    until(lambda: alive(folder, 2) == [], seconds=60)


def test_the_first_to_raise_is_named_though_it_ends_last(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "GRACE", 0.5)
    (folder / "logs" / "rank-1.error.json").write_text("of an earlier start")
    outcome = launcher.run_workers(folder, 2, "scripted_worker", ["raises", str(folder)])
    assert (outcome.kind, outcome.rank, outcome.how) == ("failed", 1, "exit code 1")
    assert outcome.lines[-1] == "ValueError: the cause"
    error = json.loads((folder / "logs" / "rank-1.error.json").read_text())["message"]
    assert error["message"] == "ValueError: the cause"
    assert abs(int(error["extraInfo"]["timestamp"]) - time.time()) < 600
    assert 'raise ValueError("the cause")' in error["extraInfo"]["py_callstack"]
    (earlier,) = (folder / "logs" / "earlier").iterdir()
    assert earlier.read_text() == "of an earlier start"


def test_a_hang_dumps_the_flight_recorders(folder: Path):
    outcome = launcher.run_workers(folder, 2, "scripted_rank", ["waits in vain", str(folder)], stall_minutes=25 / 60)
    assert outcome.kind == "stalled"
    begun = []
    for rank in range(2):
        dump = pickle.loads((folder / "logs" / f"flight-recorder-{rank}").read_bytes())
        begun.append([entry["profiling_name"] for entry in dump["entries"]].count("gloo:all_reduce"))
        lines = log_lines(folder, rank)
        assert any("most recent call first" in line for line in lines), "stacks as well"
        last = (
            "number 2, gloo:all_reduce of [[1]], not done" if rank == 0 else "number 1, gloo:all_reduce of [[1]], done"
        )
        assert f"kilobatch: last collective of default_pg: {last}" in lines
    assert begun == [2, 1]


def test_a_slow_start_counts_as_a_stall_and_slow_work_with_heartbeats_does_not(folder: Path):
    outcome = launcher.run_workers(folder, 1, "scripted_rank", ["stays", str(folder)], stall_minutes=3 / 60)
    assert (outcome.kind, outcome.rank) == ("stalled", None), "the only rank is behind nobody"
    assert launcher.run_workers(
        folder, 1, "scripted_rank", ["gets on", str(folder)], stall_minutes=3 / 60
    ) == RunOutcome("finished")
