"""The launcher with real processes and real process groups: start, failure, hang, stop and its own death."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from launch import here, watch
from launch.ending import Ending, this_host
from launch.news import LAST_LINES

LAUNCHER = """
import signal, sys
from pathlib import Path
from launch import here, watch
watch.GRACE = 0.5
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
ending = here.run(Path(sys.argv[1]), int(sys.argv[2]), "drill", [sys.argv[3], sys.argv[1]])
print(ending.kind, ending.how)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "logs").mkdir()
    return tmp_path


def launcher(folder: Path, workers: int, what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LAUNCHER, str(folder), str(workers), what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(folder: Path, workers: int) -> list[int]:
    """Ranks that have started and still run."""
    pids = {rank: folder / f"pid-{rank}" for rank in range(workers)}
    return [rank for rank, pid in pids.items() if pid.exists() and pid.read_text() and _runs(int(pid.read_text()))]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def said(folder: Path, rank: int) -> list[str]:
    """A rank's log; each line after the time at which it came."""
    lines = (folder / "logs" / f"rank-{rank}.log").read_text().splitlines()
    for line in lines:
        came = datetime.strptime(line[:24], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
        assert abs((datetime.now(UTC) - came).total_seconds()) < 60
    times = [line[:24] for line in lines]
    assert times == sorted(times)
    return [line[25:] for line in lines]


def test_workers_meet_finish_and_write_logs(folder: Path, capfd: pytest.CaptureFixture[str]):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert here.run(folder, 2, "drill", ["finishes", str(folder)]) == Ending("finished")
    assert said(folder, 0) == ["rank 0 of 2, 1 threads"]
    assert said(folder, 1) == ["rank 1 of 2, 1 threads"]
    assert capfd.readouterr().out == "rank 0 of 2, 1 threads\n"
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_first_to_fail_is_named_with_its_last_lines_and_the_others_end(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "GRACE", 0.5)
    ending = here.run(folder, 2, "drill", ["fails", str(folder)])
    assert (ending.kind, ending.rank, ending.host, ending.how) == ("failed", 1, this_host(), "exit code 1")
    assert ending.lines[-1].endswith("RuntimeError: the disk of rank 1 is on fire")
    assert len(ending.lines) == LAST_LINES
    assert alive(folder, 2) == []


def test_a_killed_worker_is_named_by_its_signal_and_a_deaf_one_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "GRACE", 0.5)
    ending = here.run(folder, 2, "drill", ["dies", str(folder)])  # rank 0 does not heed SIGTERM
    assert (ending.kind, ending.rank) == ("failed", 1)
    assert ending.how.startswith("ended by SIGKILL")
    assert alive(folder, 2) == []


def test_a_refusal_of_another_rank_than_0_is_the_message(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "GRACE", 0.5)
    ending = here.run(folder, 2, "drill", ["refuses", str(folder)])
    assert (ending.kind, ending.rank) == ("refused", 1)
    assert ending.lines == ["kilobatch: no room on the disk:", "  of this machine"]
    assert alive(folder, 2) == []


def test_a_refusal_of_all_is_rank_0s(folder: Path, capfd: pytest.CaptureFixture[str]):
    ending = here.run(folder, 2, "drill", ["all refuse", str(folder)])
    assert (ending.kind, ending.rank) == ("refused", 0), "so that the launcher need not tell it again"
    assert capfd.readouterr().out.count("no room on the disk") == 1


def test_a_rank_that_hangs_is_named_and_all_stacks_are_logged(folder: Path):
    ending = here.run(folder, 2, "toy", ["hangs", str(folder)], stall_minutes=5 / 60)
    assert (ending.kind, ending.rank) == ("stalled", 1)
    assert ending.how == "no sign of life for 0.0833333 minutes; rank 1 came the least far"
    assert any("in sleeps_for_good" in line for line in ending.lines)
    assert any("in waits_for_the_others" in line for line in said(folder, 0))
    assert alive(folder, 2) == []


def test_silence_while_starting_counts_and_work_that_takes_long_does_not(folder: Path):
    ending = here.run(folder, 1, "drill", ["stays", str(folder)], stall_minutes=5 / 60)
    assert (ending.kind, ending.rank) == ("stalled", None), "the only rank is behind nobody"
    assert here.run(folder, 1, "drill", ["gets on", str(folder)], stall_minutes=5 / 60) == Ending("finished")


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGHUP, 1)])
def test_asked_to_stop_the_workers_save_and_leave(folder: Path, number: signal.Signals, workers: int):
    process = launcher(folder, workers, "waits")
    until(lambda: all((folder / f"met-{rank}").exists() for rank in range(workers)))
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.splitlines()[-1].startswith("interrupted SIG")
    assert alive(folder, workers) == []


def test_asked_twice_kills(folder: Path):
    process = launcher(folder, 1, "stays")
    until(lambda: alive(folder, 1) == [0])
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert alive(folder, 1) == [0]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert out.splitlines()[-1].startswith("interrupted SIG"), err
    assert alive(folder, 1) == []


def test_a_second_hangup_does_not_kill(folder: Path):
    process = launcher(folder, 1, "stays")
    until(lambda: alive(folder, 1) == [0])
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
    assert alive(folder, 1) == [0]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)


def test_asked_to_stop_while_one_still_starts_and_the_others_wait_for_it(folder: Path):
    process = launcher(folder, 2, "starts")
    until(lambda: alive(folder, 2) == [0, 1])
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert out.splitlines()[-1].startswith("interrupted SIG"), err
    assert alive(folder, 2) == []


def test_asked_to_stop_at_the_end_it_has_finished(folder: Path):
    process = launcher(folder, 1, "ends anyway")
    until(lambda: alive(folder, 1) == [0])
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert out.splitlines()[-1] == "finished ", err


def test_a_killed_launcher_takes_its_workers_along(folder: Path):
    process = launcher(folder, 2, "stays")
    until(lambda: alive(folder, 2) == [0, 1])
    process.kill()
    process.communicate(timeout=20)
    until(lambda: alive(folder, 2) == [], seconds=10)


def test_a_launcher_that_died_before_the_leash_was_on(folder: Path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    command = [sys.executable, "-m", "launch.leash", gone.stdout.strip(), "drill", "finishes", str(folder)]
    late = subprocess.run(command, capture_output=True, text=True)
    assert late.returncode == 1
    assert "the launcher is gone" in late.stderr
    assert [path.name for path in folder.iterdir()] == ["logs"]
