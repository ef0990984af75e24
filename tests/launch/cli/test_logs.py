"""`kilobatch logs`: merges the ranks' logs by time, and follows them until the run is over."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.launch.cli.reports import logs
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.launch.runs.run_folder import RunOptions
from tests.launch.conftest import CommandResult

Kilobatch = Callable[..., CommandResult]


def make(**written: str) -> Path:
    """A failed run with these logs."""
    run = run_folder.create_run(RunOptions(name="demo"), "demo", "run: {}\n", 2)
    run_folder.set_status(run, "failed", 2)
    for rank, text in written.items():
        (run / "logs" / f"{rank.replace('_', '-')}.log").write_text(text)
    return run


def stamped(*lines: tuple[float, str]) -> str:
    return "".join(f"2026-11-22T07:50:{second:06.3f}Z {text}\n" for second, text in lines)


def test_ranks_are_merged_by_time(kilobatch: Kilobatch) -> None:
    first = stamped((1, "a"), (3.5, "d"), (3.5, "e"))
    make(rank_0=first, rank_1=stamped((2, "b"), (3, "c")) + "without a stamp\n", rank_10=stamped((4, "f")))
    output = kilobatch("logs", "demo").out.splitlines()
    assert [line.rpartition("| ")[2] for line in output] == ["a", "b", "c", "without a stamp", "d", "e", "f"]
    assert output[0] == "2026-11-22 07:50:01.000  rank 0 | a"
    assert output[-1] == "2026-11-22 07:50:04.000 rank 10 | f"
    assert kilobatch("logs", "demo", "--rank", "1").out.count("\n") == 3


@pytest.mark.parametrize("kept", [0, 1, 3, 4, 100])
def test_the_last_lines(kilobatch: Kilobatch, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "BLOCK", 64)  # so that lines cross blocks, and one is longer than a block
    make(rank_0=stamped((1, "a"), (3, "c" * 200), (5, "e")), rank_1=stamped((2, "b"), (4, "d")) + "half")
    whole = "abcde" if kept else ""
    output = [line.rpartition("| ")[2][:1] for line in kilobatch("logs", "demo", "-n", str(kept)).out.splitlines()]
    if kept in (0, 1):
        assert output == list(whole[-kept:])
    else:
        assert output[-2:] == ["d", "e"]
        assert len(output) <= kept


def test_what_else_workers_left_is_named_beside_the_lines(kilobatch: Kilobatch) -> None:
    run = make(rank_0=stamped((1, "a")))
    assert kilobatch("logs", "demo").err == ""
    for name in ("rank-10.error.json", "rank-9.error.json", "flight-recorder-10", "flight-recorder-9"):
        (run / "logs" / name).touch()
    (run / "logs" / "flight-recorder-10").unlink()
    result = kilobatch("logs", "demo")
    assert result.out.count("\n") == 1
    assert result.err.splitlines() == [
        "kilobatch: also there, with the error of a rank: runs/demo/logs/rank-10.error.json, 2 such files",
        "kilobatch: also there, with the last collectives of a rank: runs/demo/logs/flight-recorder-9",
    ]
    assert kilobatch("logs", "demo", "--rank", "0").err == ""


def test_attempts_are_printed_among_the_lines(kilobatch: Kilobatch) -> None:
    run = make(rank_0="2000-01-01T00:00:00.000Z early\n2099-01-01T00:00:00.000Z late\n")
    attempt = job_history.record_start(run, "17", 0, ["n0", "n1"], 4)
    job_history.record_end(run, attempt, "crashed", rank=3, host="n1", how="exit code 1", lines=["ValueError: fire"])
    output = [line.partition(" | ")[2] for line in kilobatch("logs", "demo").out.splitlines()]
    assert output == [
        "early",
        "attempt 1 began: job 17 on n0, n1, 4 workers, from step 0",
        "attempt 1 ended: crashed, step 0, rank 3 on n1: exit code 1, ValueError: fire",
        "late",
    ]


def test_a_run_without_logs_prints_its_state(kilobatch: Kilobatch, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make()
    assert kilobatch("logs", "demo").out == "runs/demo has written nothing yet: failed\n"
    (run / "logs" / "rank-0.log").touch()
    (run / "logs" / "rank-1.log").touch()
    refused = kilobatch("logs", "demo", "--rank", "7")
    assert refused.code == 2
    assert "no log of rank 7; it has ranks 0 to 1" in refused.err
    ended_job = JobFile(cluster="local", job_id="local-999999999-1", submitted=job_history.utc_now(), code="code/001")
    job_history.write_job_file(run, ended_job)
    (run / "submitit").mkdir()
    (run / "submitit" / "local.log").write_text("module: command not found\n")
    output = kilobatch("logs", "demo").out
    assert "failed as job local-999999999-1" in output
    assert "module: command not found" in output


def test_it_follows_new_lines_and_new_files_until_the_end(kilobatch: Kilobatch) -> None:
    run = make(rank_0=stamped((1, "a"), (2, "b")))
    with run_folder.locked(run):
        run_folder.set_status(run, "running", 2)
        command = [sys.executable, "-m", "kilobatch", "logs", str(run.absolute()), "-f", "-n", "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | _path()) as follower:
            assert follower.stdout
            assert follower.stdout.readline().endswith("| b\n")
            with (run / "logs" / "rank-0.log").open("a") as file:
                file.write(stamped((4, "d"))[:-1])  # half a line is not printed yet
                file.flush()
                (run / "logs" / "rank-1.log").write_text(stamped((3, "c")))
                assert follower.stdout.readline().endswith("| c\n")
                file.write("dd\n")
            assert follower.stdout.readline().endswith("| ddd\n")
            job_history.record_start(run, "17", 1, ["n1"], 2)
            assert "attempt 1 began: job 17 on n1" in follower.stdout.readline()
            with (run / "logs" / "rank-1.log").open("a") as file:
                file.write(stamped((5, "the last")))
            run_folder.set_status(run, "finished", 2)
            assert follower.stdout.read().endswith("| the last\n")
            assert follower.wait(timeout=60) == 0


def test_a_reader_that_leaves_is_no_error(kilobatch: Kilobatch) -> None:
    run = make(rank_0=stamped(*((1, "x" * 100) for _ in range(3000))))
    command = f"{sys.executable} -m kilobatch logs {run.absolute()} | head -n 1"
    done = subprocess.run(command, shell=True, env=os.environ | _path(), capture_output=True, text=True, timeout=60)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_long_logs_take_little_time(kilobatch: Kilobatch) -> None:
    lines = [(n % 60, f"step {n}") for n in range(60)]
    make(**{f"rank_{rank}": stamped(*lines) * 500 for rank in range(4)})
    began = time.process_time()
    assert kilobatch("logs", "demo").out.count("\n") == 4 * 60 * 500
    assert time.process_time() - began < 5


def _path() -> dict[str, str]:
    return {"PYTHONPATH": str(Path(__file__).resolve().parents[3] / "src")}
